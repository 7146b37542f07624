"""The page for people: photos are dropped on it, restored one after the other, and compared."""
