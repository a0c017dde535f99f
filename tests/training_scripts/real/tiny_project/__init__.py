"""A project that is run as `python -m tiny_project.train`."""
