"""The check of a config's variant, the text after the colon of `--config`."""

from collections.abc import Iterable


def check_variant(variant: str, variants: Iterable[str]) -> None:
    """Raises ValueError if a config has no such variant."""
    variants = list(variants)
    if variant not in variants:
        raise ValueError(
            f"there is no variant {variant!r}: it must be one of {', '.join(variants)}"
        )
