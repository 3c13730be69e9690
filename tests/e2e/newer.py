"""A process of a version to come, for tests: its entries are of a format that today's cannot read.

python -m tests.e2e.newer listen|work
"""

import sys

from worker import lane_scripts, lanes
from worker.__main__ import main

lane_scripts.ADD = lane_scripts.ADD.replace("'e'", "'e2'").replace("\\te'", "\\te2'")
lanes.FORMATS[b"e2"] = lanes.FORMATS[b"e"]

if __name__ == "__main__":
    sys.exit(main())
