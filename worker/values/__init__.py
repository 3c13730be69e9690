"""Typed values: from what the wire carries to Python values of the column's type, and to canonical texts.

Pure but for `decode_by_database`, which has Postgres read the types that Python does not.
"""

from worker.values.canonical import canonical, canonicalizer, from_canonical
from worker.values.database import decode_by_database
from worker.values.decoding import Decoder, Form, decoder
from worker.values.wire import is_cut, may_hide_nan, needs_repair

__all__ = [
    "Decoder",
    "Form",
    "canonical",
    "canonicalizer",
    "decode_by_database",
    "decoder",
    "from_canonical",
    "is_cut",
    "may_hide_nan",
    "needs_repair",
]
