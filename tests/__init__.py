"""The tests: a package, so that no other installed package called `tests` is taken for it."""
