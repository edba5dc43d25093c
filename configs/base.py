"""Every key of a run, with its default. A recipe starts from this and changes what it needs.

What each key means, and what it may be, stands in coca_jax/config and in docs/config.md.
"""

from ml_collections import ConfigDict, FieldReference

from coca_jax.config import Config

# To which batches of real captions are cut, see docs/data.md; those beyond max_len are not used.
TEXT_LENGTHS = (16, 24, 32, 48)


def get_config() -> ConfigDict:
    """Returns the default configuration; each value can be set as `--config.key=value`."""
    config = ConfigDict(Config().to_dict(), convert_dict=True)
    with config.ignore_type():
        for key in ("image_size", "patch_size"):  # a number, or a pair of them
            config.model[key] = FieldReference(config.model[key], field_type=object)
    return config
