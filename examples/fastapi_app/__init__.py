"""An API on Supabase, beside the worker: people, posts, files, and derived figures as they change.

`app.py` puts it together; each of the other modules is one subject. Read README.md first.
"""
