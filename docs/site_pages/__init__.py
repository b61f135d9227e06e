"""The pages of the site that are made from the code, and what puts the site together. `docs/build.py` is the command."""
