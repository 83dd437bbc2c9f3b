"""Adapters that make the models usable in other packages. Each is imported by that package, never by this one."""
