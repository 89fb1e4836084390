"""A proxy made of grpcio's own server and client: passes every call on to SERVER.

    pass_through.py SERVER [OPTION=NUMBER...]

Takes options of grpcio's server, such as grpc.max_connection_age_ms=500. Prints the port at which it listens on loopback. As gRPC's core does, it sends the headers of an answer with the first
message, and ends connections that ping it too often.
"""

import sys
from concurrent import futures

import grpc

target = sys.argv[1].removeprefix("http://")
options = [("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20)]
channel = grpc.insecure_channel(target, options)


class PassThrough(grpc.GenericRpcHandler):
    def service(self, details):
        def forward(requests, context):
            call = channel.stream_stream(details.method)(requests)
            context.add_callback(call.cancel)
            try:
                yield from call
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        return grpc.stream_stream_rpc_method_handler(forward)


# A lane occupies a thread for its whole life.
of_server = [(name, int(number)) for name, number in (option.split("=") for option in sys.argv[2:])]
server = grpc.server(futures.ThreadPoolExecutor(64), handlers=[PassThrough()], options=options + of_server)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
