"""Would the tests notice? Changes the code in small ways, one at a time, and runs the tests against each change."""
