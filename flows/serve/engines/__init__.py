"""Other engines behind this server: each a process in an environment of its own, which is given tokens and gives some.

Requests are read, rendered, held to rates, recorded and cut at stop texts here, as those of temper's own engine are.
"""
