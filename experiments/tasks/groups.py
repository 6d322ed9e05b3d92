"""How reports choose among the examples of a test split, and group them."""

from collections.abc import Mapping, Sequence

import numpy as np

# More sizes than this are shown in groups.
MAX_GROUPS = 12


def spread(rows: Sequence, count: int) -> list:
    """Rows evenly chosen, the first and the last among them; all if there are fewer."""
    return [
        rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, count).astype(int))
    ]


def size_groups(sizes: np.ndarray) -> list[np.ndarray]:
    """Indices of the examples of each size, or of ranges where there are many."""
    distinct = np.unique(sizes)
    ranges = np.array_split(distinct, min(len(distinct), MAX_GROUPS))
    return [np.flatnonzero(np.isin(sizes, some)) for some in ranges]


def measures_by_size(
    sizes: np.ndarray,
    measures: Mapping[str, np.ndarray],
    columns: tuple[str, str] = ("elements", "sets"),
) -> list[dict]:
    """A row per group of sizes: the range, how many sets, the mean of each measure.

    NaN values, which measure nothing, are left out.

    Args:
      sizes: a number of each example.
      measures: {name: values [example, ...]}.
      columns: what the number, and what is counted.
    """
    rows = []
    for group in size_groups(sizes):
        low, high = sizes[group].min(), sizes[group].max()
        row = {
            columns[0]: str(low) if low == high else f"{low} to {high}",
            columns[1]: len(group),
        }
        for name, values in measures.items():
            real = values[group][~np.isnan(values[group])]
            row[name.replace("_", " ")] = float(real.mean()) if len(real) else None
        rows.append(row)
    return rows
