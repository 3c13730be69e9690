TITLE = "x"
WORKLOADS = []


async def measure(*a, **k): ...
