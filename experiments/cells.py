"""Sections of recurrent networks that the configs of sequences share."""

from typing import Any

CELLS = {
    "rnn": {"name": "SimpleCell"},
    "gru": {"name": "GRUCell"},
    "plain_gru": {"name": "GRUCell", "relevance_gate": False},
    "lstm": {"name": "LSTMCell"},
    "peephole": {"name": "PeepholeLSTMCell"},
    "min_gru": {"name": "MinGRUCell"},
    "min_lstm": {"name": "MinLSTMCell"},
    "linear": {"name": "LinearRecurrentUnit"},
}


def stack(cell: str, hidden_size: int, *, cell_fields: Any = (), **fields) -> dict:
    """The section of a `RecurrentStack`.

    Args:
      cell: a key of `CELLS`.
      hidden_size: of the cell.
      cell_fields: other fields of the cell.
      fields: those of the stack.
    """
    section = CELLS[cell] | {"hidden_size": hidden_size} | dict(cell_fields)
    return {"name": "RecurrentStack", "cell": section} | fields
