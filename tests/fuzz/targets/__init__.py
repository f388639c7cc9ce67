"""The targets; C{tests.fuzz} says what one has."""
