"""A client of postcopy in another language, from the .proto files and the documented frame layout alone.

    client.py SERVER STUBS REFERENCE PATH OUT

Lists the images; reads the file PATH of REFERENCE with ReadFile, and with OpenImage, FetchChunks and StreamChunks,
verifying root, segments and chunks against the image's digest; writes what it read to OUT/{read_file,fetch,stream};
prints a JSON object with what it saw. STUBS is the folder that grpc_tools generated into.
"""

import json
import pathlib
import struct
import sys

server, stubs, reference, path, out = sys.argv[1:]
sys.path.insert(0, stubs)

import blake3
import grpc
import zstandard
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from postcopy.v1 import (
    image_service_pb2,
    image_service_pb2_grpc,
    manifest_pb2,
    page_service_pb2,
    page_service_pb2_grpc,
)

PAGE = 4096
SEGMENT_CHUNKS = 16384


def digest(data):
    return blake3.blake3(data).digest()


def decode_frame(frame):
    """The chunk's plain bytes, by the layout in proto/src/frame.rs."""
    codec, kind, runs, chunk_len, plain_len, coded_len = struct.unpack_from("<BBHIII", frame, 0)
    assert codec in (0, 1) and kind == 0 and 1 <= runs <= 256, (codec, kind, runs)
    assert len(frame) == 16 + 4 * runs + coded_len, "the header gives the frame's length"
    coded = frame[16 + 4 * runs :]
    if codec == 0:
        held = coded
    else:
        held = zstandard.ZstdDecompressor().decompress(coded, max_output_size=plain_len)
    assert len(held) == plain_len
    chunk, taken = bytearray(chunk_len), 0
    for i in range(runs):
        first, count = struct.unpack_from("<HH", frame, 16 + 4 * i)
        start, end = first * PAGE, min((first + count) * PAGE, chunk_len)
        chunk[start:end] = held[taken : taken + end - start]
        taken += end - start
    assert taken == plain_len
    return bytes(chunk), codec


def address(text):
    return text.removeprefix("http://")


channel = grpc.insecure_channel(address(server), options=[("grpc.max_receive_message_length", 4 << 20)])
images = image_service_pb2_grpc.ImageServiceStub(channel)
pages = page_service_pb2_grpc.PageServiceStub(channel)
seen = {}

# Images, a page of one at a time.
listed, token = [], ""
while True:
    page = images.ListImages(image_service_pb2.ListImagesRequest(page_size=1, page_token=token))
    listed += [{"reference": i.reference, "image": i.image.hex(), "size_bytes": i.size_bytes} for i in page.images]
    token = page.next_page_token
    if not token:
        break
seen["images"] = listed

# Plain bytes.
request = page_service_pb2.ReadFileRequest(reference=reference, path=path.encode())
parts = [part.data for part in pages.ReadFile(request)]
assert all(0 < len(part) <= 1 << 20 for part in parts)
data = b"".join(parts)
pathlib.Path(out, "read_file").write_bytes(data)

# The manifest, believed only as far as digests carry.
root, segments, opened = b"", {}, None
request = page_service_pb2.OpenImageRequest(reference=reference, first_paths=[path.encode()], all_segments=True)
for answer in pages.OpenImage(request):
    part = answer.WhichOneof("part")
    if part == "opened":
        opened = answer.opened
    elif part == "root_part":
        root += answer.root_part
    else:
        assert answer.segment.WhichOneof("result") == "segment"
        segments[answer.segment.index] = answer.segment.segment
assert len(root) == opened.root_bytes and digest(root) == opened.image
manifest = manifest_pb2.Root.FromString(root)
wanted = [manifest.segment_digests[i : i + 32] for i in range(0, len(manifest.segment_digests), 32)]
assert sorted(segments) == list(range(len(wanted)))
chunks = []
for index, expected in enumerate(wanted):
    assert digest(segments[index]) == expected
    for run in manifest_pb2.Segment.FromString(segments[index]).runs:
        if run.WhichOneof("kind") == "zero_chunks":
            chunks += [None] * run.zero_chunks
        else:
            chunks += [run.chunk_digests[i : i + 32] for i in range(0, len(run.chunk_digests), 32)]
size = manifest.chunk_size_bytes
first = 0
for entry in manifest.entries:
    if entry.WhichOneof("kind") == "file":
        count = -(-entry.file.size_bytes // size)
        if entry.path == path.encode():
            break
        first += count
file = entry.file
seen |= {"image": opened.image.hex(), "segments": len(wanted), "chunks": len(chunks), "first": first, "count": count}


def assemble(answers):
    """The file from chunk answers in any order."""
    parts, codecs, zeros = {}, set(), 0
    for answer in answers:
        number = answer.chunk - first
        length = min(size, file.size_bytes - number * size)
        if answer.WhichOneof("result") == "zero":
            assert chunks[answer.chunk] is None
            parts[number], zeros = bytes(length), zeros + 1
        else:
            assert answer.WhichOneof("result") == "frame", answer.error
            chunk, codec = decode_frame(answer.frame)
            assert len(chunk) == length and digest(chunk) == chunks[answer.chunk]
            parts[number] = chunk
            codecs.add(codec)
    assert sorted(parts) == list(range(count))
    return b"".join(parts[i] for i in range(count)), codecs, zeros


def runs_of(most):
    for start in range(0, count, most):
        yield page_service_pb2.ChunkRun(first=first + start, count=min(most, count - start))


def fetch_requests():
    for i, run in enumerate(runs_of(1000)):
        demand = page_service_pb2.REQUEST_CLASS_DEMAND
        image = opened.image if i == 0 else b""
        yield page_service_pb2.FetchChunksRequest(id=i + 7, **{"class": demand}, image=image, runs=[run])


answers = list(pages.FetchChunks(fetch_requests()))
assert {a.id for a in answers} == {7 + i for i in range(-(-count // 1000))}
fetched, codecs, zeros = assemble(a.chunk for a in answers)
pathlib.Path(out, "fetch").write_bytes(fetched)


def stream_requests():
    for i, run in enumerate(runs_of(16384)):
        yield page_service_pb2.StreamChunksRequest(id=i, image=opened.image, runs=[run])


messages = list(pages.StreamChunks(stream_requests()))
streamed, _, _ = assemble(chunk for message in messages for chunk in message.chunks)
pathlib.Path(out, "stream").write_bytes(streamed)
seen |= {"codecs": sorted(codecs), "zeros": zeros, "messages": len(messages), "file": blake3.blake3(data).hexdigest()}

# Errors have their codes.
try:
    list(pages.ReadFile(page_service_pb2.ReadFileRequest(reference="none", path=b"x")))
except grpc.RpcError as error:
    seen["not_found"] = [error.code().name, error.details()]

# Reflection, both versions. The newer one has the same messages under another name.
def services(method):
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    call = channel.stream_stream(
        method,
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = call(iter([listing]))
    return sorted(service.name for service in answer.list_services_response.service)


seen["reflection"] = {
    version: services(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo") for version in ("v1", "v1alpha")
}
health = health_pb2_grpc.HealthStub(channel)
seen["health"] = {
    name: health_pb2.HealthCheckResponse.ServingStatus.Name(
        health.Check(health_pb2.HealthCheckRequest(service=name)).status
    )
    for name in ("", "postcopy.v1.PageService", "postcopy.v1.ImageService")
}
print(json.dumps(seen))
