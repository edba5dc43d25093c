"""The flags of own data in place of a recipe's: --data, and the fields of them."""

from __future__ import annotations

from absl import flags

FIELDS = ("text_field", "label_field", "image_field")


def define() -> None:
    """Defines `--data`, own data in place of a recipe's, and the flags that name fields of them,
    for `own_data.of_command`. To stand before `--config`, whose messages name it."""
    flags.DEFINE_multi_string(
        "data",
        [],
        "Own data in place of the recipe's: PATH, PATH:KIND or PATH:KIND:WEIGHT, the kind being "
        "caption, label or question. The weight is its share of each batch, 1 where none "
        "is given. Repeatable. Where it is not prepared, an index is made on the way, and it is "
        "read in place.",
    )
    for name in FIELDS:
        note = f"--data: field of the {name.split('_')[0]}, where it has an unusual name."
        flags.DEFINE_string(name, "", note)


def fields() -> dict[str, str]:
    """The fields that the flags beside `--data` name; '' for those that are not given."""
    return {name: flags.FLAGS[name].value for name in FIELDS}


def given() -> dict[str, str]:
    """Those of these flags that are given, as the processes of a run compare them: {flag: value}.
    Of other data one process would wait for an index that no other makes."""
    found = {"data": " ".join(flags.FLAGS.data)} | fields()
    return {f"--{name}": value for name, value in found.items() if value}
