"""The recipes. They lie in the folder `configs` of a checkout; a wheel holds that folder here."""

import pathlib

# This file serves the checkout and editable installs alone: setup.py maps the package to ../configs
# when it builds a wheel, so that users import recipes by one name everywhere.
__path__ = [str(pathlib.Path(__file__).parents[2] / "configs")]
