"""The usual glue, written as the tutorials have it: a callback enqueues a job, a job is one transaction.

Each module has one job runner with the same job, the same single-row upsert that our own handlers make. It is
started by its own command; `python -m benchmarks.glue.MODULE COUNT` fills its queue. Where the servers are is
in DATABASE_URL and REDIS_URL.
"""
