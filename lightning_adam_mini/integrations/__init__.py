"""AdamMini where other frameworks build the optimizer: one module a framework, which is imported with it.

Nothing here is imported by the rest of the library, and a module imports no framework but its own.
"""
