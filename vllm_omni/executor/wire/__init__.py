"""Messages between processes as bytes: a closed table of types, written as msgpack. Never pickle; nothing that is read
can name a class, a function or a module that the table does not hold.

`codec.encode(message, put)` gives bytes and hands every tensor (and large bytes, as uint8 tensors) to `put`, which says
how the message refers to it: any plain value, such as its place in a list. `codec.decode(body, get)` gives an equal
message and asks `get` for the tensor of each such value. How tensors travel is the transport's matter: shared memory
between the processes of one machine, an object store between machines.
"""
