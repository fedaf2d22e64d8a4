"""HTTP/1.1 as the proxy needs it, on llhttp (`httptools`): a door for agents, connections to engines.

General frameworks cost more processor time for each request than all of the capture.
"""
