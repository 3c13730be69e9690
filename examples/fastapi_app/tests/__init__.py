"""How the handler of this example is tested: copy it beside yours."""
