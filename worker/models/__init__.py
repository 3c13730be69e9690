"""SQLAlchemy models written from a database: what is there, and the text that says so.

For people and their editors. Nothing of the mechanism uses what is written here.
"""

from worker.models.drift import differences
from worker.models.reflection import Wanted, reflect

__all__ = ["Wanted", "differences", "reflect"]
