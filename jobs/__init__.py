"""The drivers of the five stages, and the command line. Read `pipeline.py` first."""
