"""One listener's reading of the source, from taking the lease to losing it; one module for each delivery."""

from worker.reading.ground import Ground, Reading
from worker.reading.plain import PlainReading
from worker.reading.proven import ProvenReading

__all__ = ["Ground", "PlainReading", "ProvenReading", "Reading"]
