"""The recipes that ship: functions that return one. A variant is `replace(base(), …)`."""
