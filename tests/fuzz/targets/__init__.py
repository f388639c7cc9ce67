"""The targets; C{tests.fuzz} describes them."""
