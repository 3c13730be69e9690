"""The demo: a shop that keeps writing orders, and Tailrace deriving tables from them, all on this machine.

Everything is real: PostgreSQL, Redis, the websocket, the listener, the arq worker and the handlers of the
package `handlers`. Only Supabase itself is stood in for. `python -m examples.demo` runs it.
"""
