"""Check whether the tests would notice a bug: change the code in one small way at a time, and run the tests."""
