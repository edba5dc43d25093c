"""Where things are kept: a path's file or object, folders to write into, files with checksums."""
