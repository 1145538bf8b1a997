"""images.py and the tools that look at images: whatever comes is an image or a clear sentence.

    pytest tests/test_images.py

No traffic but to a server of the test's own on 127.0.0.1, which is let in by an argument.
"""

import asyncio
import base64
import io
import json
import math
import os
import random
import resource
import struct
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image, ImageDraw

import images
from images import MAX_PIXELS, Picture, open_frames, open_image, to_data_uri, to_png
from run import http
from run.config import UserError
from tools import Toolbox

LOOKING = (
    "crop zoom rotate draw_line draw_horizontal draw_vertical draw_box mark_point select_frames"
).split()


def encoded(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def giant_png(width, height):
    """A black PNG of a bit a pixel, a few kilobytes in all, made without holding its pixels."""
    rows = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()

    def chunk(name, body):
        checksum = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    ends = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + ends


def halves(left, right, size=(40, 20)):
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def animation(kind="GIF", count=5):
    frames = [Image.new("RGB", (30, 20), (40 * number, 0, 0)) for number in range(count)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def refused(source, **options):
    """The sentence with which open_image refuses."""
    with pytest.raises(UserError) as raised:
        open_image(source, **options)
    text = str(raised.value)
    assert "\n" not in text and 20 < len(text) < 400
    return text


def peak_memory():
    """Bytes, the most that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -- what is opened


@pytest.mark.parametrize("mode", "1 L P RGB RGBA LA PA CMYK YCbCr LAB HSV I F I;16".split())
def test_every_mode_becomes_rgb(mode):
    image = open_image(Image.new(mode, (7, 5)))
    assert (image.mode, image.size, image.info) == ("RGB", (7, 5), {})


def test_what_is_transparent_is_white_and_colours_stay():
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 255, 0))
    assert list(open_image(encoded(half)).getdata()) == [(255, 0, 0), (255, 255, 255)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    shown = open_image(encoded(palette, transparency=0))
    assert list(shown.getdata()) == [(255, 255, 255), (0, 255, 0)]


def test_sixteen_bits_of_grey_keep_their_upper_ones():
    grey = Image.new("I;16", (2, 1))
    grey.putpixel((0, 0), 257 * 10)
    grey.putpixel((1, 0), 65535)
    assert list(open_image(encoded(grey)).getdata()) == [(10, 10, 10), (255, 255, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_upright(orientation):
    """The pixels are stored turned, and EXIF says how a viewer turns them back."""
    original = halves("red", "blue")
    original.paste("white", (0, 10, 40, 20))
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = original.transpose(turned[orientation]) if orientation > 1 else original
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encoded(stored, exif=exif))
    assert opened.size == (40, 20) and opened.tobytes() == original.tobytes()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exif_that_cannot_be_read_turns_nothing():
    data = encoded(halves("red", "blue"), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert open_image(data).size == (40, 20)


def test_the_forms_of_a_source_give_one_image(tmp_path):
    image = halves("red", "blue")
    (tmp_path / "a.png").write_bytes(to_png(image))
    plain = "data:image/png;base64," + base64.b64encode(to_png(image)).decode()
    absolute = str(tmp_path / "a.png")
    sources = [to_png(image), plain, to_data_uri(image), "a.png", absolute, tmp_path / "a.png"]
    for source in [*sources, image]:
        assert open_image(source, folder=tmp_path).tobytes() == image.tobytes()


def test_an_animation_is_its_first_frame_and_its_frames_come_one_by_one():
    for kind in ("GIF", "WEBP", "PNG"):
        data = animation(kind)
        frames = list(open_frames(data))
        assert len(frames) == 5 and {frame.mode for frame in frames} == {"RGB"}
        reds = [frame.getpixel((0, 0))[0] for frame in frames]
        assert all(abs(red - 40 * number) < 12 for number, red in enumerate(reds))
        assert open_image(data).tobytes() == frames[0].tobytes()


def test_the_pixels_of_a_picture_that_no_model_has_prepared_are_shown_as_they_are():
    image = halves("red", "blue")
    assert Picture(image).shown is image


# -- what is refused


def test_bombs_are_refused_by_their_header_and_memory_stays():
    bomb = giant_png(20_000, 20_000)
    assert len(bomb) < 300_000
    before = peak_memory()
    assert f"at most {MAX_PIXELS:,}" in refused(giant_png(6000, 6000))
    assert f"{MAX_PIXELS:,}" in refused(bomb)
    assert f"{MAX_PIXELS:,}" in refused(giant_png(60_000, 60_000))  # which Pillow refuses itself
    assert peak_memory() - before < 50e6


def test_the_largest_image_is_opened():
    before = peak_memory()
    side = math.isqrt(MAX_PIXELS)
    assert open_image(giant_png(side, side)).size == (side, side)
    assert peak_memory() - before < 400e6


def test_an_image_that_is_too_thin_for_any_processor_is_refused():
    assert "100 times" in refused(encoded(Image.new("RGB", (2000, 4))))
    assert open_image(Image.new("RGB", (1, 1))).size == (1, 1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of broken TIFF tags
def test_truncated_files_and_flipped_bits_are_an_image_or_a_sentence():
    """Every kind that is read, cut anywhere or with bytes changed: 600 files."""
    chance = random.Random(0)
    image = Image.effect_noise((60, 40), 80).convert("RGB")
    kinds = [encoded(image, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")]
    kinds += [animation(), encoded(image.convert("RGBA"), "WEBP")]
    outcomes = {"opened": 0, "refused": 0}
    for _ in range(600):
        data = bytearray(chance.choice(kinds))
        if chance.random() < 0.5:
            del data[chance.randrange(len(data)) :]
        for _ in range(chance.randrange(4)):
            if data:
                data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
        try:
            opened = open_image(bytes(data))
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert opened.mode == "RGB"
            outcomes["opened"] += 1
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize(
    "source, why",
    [
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that can be read"),
        (b"%PDF-1.7", "no image that can be read"),
        (b"", "no image that can be read"),
        (b"hello", "no image that can be read"),
        ("data:image/svg+xml,%3Csvg%2F%3E", "SVG"),
        ("data:image/png;base64,!!", "base64"),
        ("data:image/png;base64", "cut off"),
        (7, "type int"),
        (None, "type NoneType"),
        ("a.png", "no folder of images"),
        ("https://example.org/a.png", "not allowed"),
        ("ftp://example.org/a.png", "expected a path"),
        ("file:///etc/passwd", "expected a path"),
        (bytes(images.MAX_BYTES + 1), "bytes: expected at most"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(source, why):
    assert why in refused(source)


def test_paths_outside_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(to_png(halves("red", "blue")))
    (folder / "link.png").symlink_to(secret)
    (folder / "round").symlink_to(folder / "round")
    os.mkfifo(folder / "pipe.png")
    for path in ("../secret.png", str(secret), "link.png", "/etc/passwd", "x/../../secret.png"):
        assert "outside" in refused(path, folder=folder)
    for path in ("pipe.png", ".", "nothing.png", "~/a.png"):
        assert "no file" in refused(path, folder=folder)
    for path in ("a\0b", "a" * 5000, "round"):
        assert "the image" in refused(path, folder=folder)


def test_a_file_that_is_too_long_is_not_read(tmp_path):
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    assert "bytes: expected at most" in refused("long.png", folder=tmp_path)


# -- the internet, and what only looks like it


@pytest.mark.parametrize(
    "address",
    """
    127.0.0.1 127.1.2.3 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1
    224.0.0.1 255.255.255.255 ::1 :: fe80::1 fc00::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ff02::1
    64:ff9b::7f00:1 2002:7f00:1::1 fe80::1%eth0
    """.split(),
)
def test_addresses_of_a_network_of_our_own_are_not_public(address):
    assert not http.is_public(address)


def test_addresses_of_the_internet_are_public():
    assert http.is_public("93.184.216.34") and http.is_public("2606:2800:220:1:248:1893:25c8:1946")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0", "127.1"]
)
def test_urls_to_this_machine_are_refused_however_they_are_written(host):
    assert "this machine" in refused(f"http://{host}:1/a.png", allow_urls=True)


def test_a_name_that_leads_to_this_machine_is_refused_and_is_looked_up_once(monkeypatch, server):
    """A name server may say something else at each question: the answer that was checked counts."""
    asked = []

    def lookup(host, *arguments, **options):
        asked.append(host)
        first = "127.0.0.1" if host == "inside.example" else "93.184.216.34"
        return [(2, 1, 6, "", (first, 0)), (2, 1, 6, "", ("10.0.0.7", 0))]

    with monkeypatch.context() as patched:
        patched.setattr(http.socket, "getaddrinfo", lookup)
        for host in ("inside.example", "both.example"):
            assert "this machine" in refused(f"http://{host}/a.png", allow_urls=True)
    assert asked == ["inside.example", "both.example"]

    def rebinding(host, *arguments, **options):
        asked.append(host)
        assert host == "changing.example", "a second look-up"
        return [(2, 1, 6, "", ("127.0.0.1", 0))]

    port = server.server_port
    with monkeypatch.context() as patched:
        patched.setattr(http.socket, "getaddrinfo", rebinding_or_address(rebinding))
        url = f"http://changing.example:{port}/image"
        assert http.fetch_public(url, 10_000, allowed=lambda address: True) == server.image
    assert asked[2:] == ["changing.example"]
    assert server.hosts[-1] == f"changing.example:{port}"


def rebinding_or_address(lookup):
    """Of an address nobody asks a name server; connecting to it goes through getaddrinfo too."""
    real = http.socket.getaddrinfo

    def look(host, *arguments, **options):
        if host == "127.0.0.1":
            return real(host, *arguments, **options)
        return lookup(host, *arguments, **options)

    return look


@pytest.fixture
def server():
    """A server on 127.0.0.1 that has an image, and redirects."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            made.hosts.append(self.headers["host"])
            if self.path == "/image":
                self._send(200, made.image)
            elif self.path == "/endless":
                self._send(200, b"x" * 100_000)
            elif self.path.startswith("/to/"):
                self._send(302, b"", location=self.path.removeprefix("/to/"))
            elif self.path == "/round":
                self._send(302, b"", location="/round")
            else:
                self._send(404, b"nothing")

        def _send(self, status, body, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.image = to_png(halves("red", "blue"))
    made.hosts = []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_a_url_is_fetched_with_a_limit_and_redirects_are_checked_each(server):
    here = f"http://127.0.0.1:{server.server_port}"

    def fetch(path, limit=10_000, allowed=lambda address: address == "127.0.0.1"):
        return http.fetch_public(here + path, limit, allowed)

    assert fetch("/image") == server.image
    assert fetch("/to//image") == server.image
    for path, why in [
        ("/endless", "more than 10,000 bytes"),
        ("/nothing", "HTTP 404"),
        ("/round", "redirected more than"),
        ("/to/http://127.0.0.2:1/x", "this machine"),
        ("/to/file:///etc/passwd", "no address"),
    ]:
        with pytest.raises(http.HttpError) as raised:
            fetch(path)
        assert why in str(raised.value)


# -- the tools


def call(box, example, pictures, name, arguments):
    async def scene():
        session = box.open(example, pictures)
        try:
            return await session.call(name, arguments)
        finally:
            await session.close()

    return asyncio.run(scene())


def chart():
    image = Image.new("RGB", (400, 200), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle([100, 50, 199, 149], fill="blue")
    return image


@pytest.fixture(scope="module")
def looking():
    return Toolbox(LOOKING)


def only_image(result):
    content, error, _ = result
    assert error is None
    (image,) = content
    return image


def test_crop_and_zoom_cut_from_the_original(looking):
    picture = Picture(chart(), shown=chart().resize((40, 20)))
    part = only_image(
        call(looking, {}, [picture], "crop", {"image": 1, "box": [250, 250, 500, 750]})
    )
    assert part.size == (100, 100) and part.getcolors() == [(10_000, (0, 0, 255))]
    part = only_image(
        call(looking, {}, [picture], "zoom", {"image": 1, "box": [250, 250, 500, 750]})
    )
    assert part.size == (1024, 1024) and part.getpixel((512, 512)) == (0, 0, 255)


def test_pixels_are_those_of_the_image_as_shown():
    box = Toolbox(["crop"], options=["crop.coordinates=pixels"])
    picture = Picture(chart(), shown=chart().resize((40, 20)))
    part = only_image(call(box, {}, [picture], "crop", {"image": 1, "box": [10, 5, 20, 15]}))
    assert part.size == (100, 100) and part.getcolors() == [(10_000, (0, 0, 255))]
    content, error, _ = call(box, {}, [picture], "crop", {"image": 1, "box": [0, 0, 41, 20]})
    assert error == "bad_box" and "x goes from 0 to 40, y from 0 to 20" in content


def test_the_schema_says_which_coordinates_also_where_nothing_is_made():
    for describe_only in (False, True):
        relative = Toolbox(["crop"], describe_only=describe_only).schemas
        options = ["crop.coordinates=pixels"]
        pixels = Toolbox(["crop"], options=options, describe_only=describe_only).schemas
        assert "0 to 1000" in json.dumps(relative) and "in pixels" in json.dumps(pixels)
        assert "{units}" not in json.dumps(relative + pixels)


def test_a_turn_goes_clockwise_and_quarters_lose_nothing(looking):
    picture = Picture(halves("red", "blue"))
    turned = only_image(call(looking, {}, [picture], "rotate", {"image": 1, "degrees": 90}))
    assert turned.size == (20, 40) and turned.getpixel((0, 0)) == (255, 0, 0)
    back = only_image(call(looking, {}, [Picture(turned)], "rotate", {"image": 1, "degrees": -90}))
    assert back.tobytes() == picture.original.tobytes()
    tilted = only_image(call(looking, {}, [picture], "rotate", {"image": 1, "degrees": 45}))
    assert tilted.size[0] > 40 and tilted.getpixel((0, 0)) == (255, 255, 255)


def test_what_is_drawn_is_red_where_it_should_be_and_leaves_the_original(looking):
    picture = Picture(chart())
    before = picture.original.tobytes()
    for name, arguments, places in [
        ("draw_horizontal", {"y": 900}, [(0, 179), (399, 179)]),
        ("draw_vertical", {"x": 900}, [(359, 0), (359, 199)]),
        ("draw_line", {"start": [0, 0], "end": [1000, 1000]}, [(20, 10), (380, 190)]),
        ("draw_box", {"box": [250, 250, 500, 750]}, [(100, 50), (199, 100), (150, 149)]),
        ("mark_point", {"point": [900, 500]}, [(359, 100)]),
    ]:
        image = only_image(call(looking, {}, [picture], name, {"image": 1, **arguments}))
        assert image.size == (400, 200)
        for place in places:
            assert image.getpixel(place) == (255, 0, 0), (name, place)
    assert picture.original.tobytes() == before


def test_the_images_are_those_that_are_there_at_the_call(looking):
    """A tool's own image can be looked at by the next call: the list is live."""

    async def scene():
        pictures = [Picture(chart())]
        session = looking.open({}, pictures)
        whole = {"image": 2, "box": [0, 0, 1000, 1000]}
        content, error, _ = await session.call("crop", whole)
        assert error == "no_image" and "the only image is 1" in content
        pictures.append(Picture(halves("red", "blue")))
        return await session.call("crop", whole)

    assert only_image(asyncio.run(scene())).size == (40, 20)


def test_frames_of_a_gif_and_of_a_list(tmp_path, looking):
    (tmp_path / "a.gif").write_bytes(animation(count=6))
    names = []
    for number in range(3):
        names.append(f"{number}.png")
        (tmp_path / names[-1]).write_bytes(to_png(Image.new("RGB", (9, 9), (number, 0, 0))))
    box = Toolbox(["select_frames"], options=[f"select_frames.folder={tmp_path}"])
    content, error, _ = call(box, {"clip": "a.gif"}, [], "select_frames", {"frames": [2, 6]})
    assert error is None and [content[0], content[2]] == ["frame 2", "frame 6"]
    assert abs(content[3].getpixel((0, 0))[0] - 200) < 12
    content, error, _ = call(box, {"clip": names}, [], "select_frames", {"frames": [3]})
    assert content[0] == "frame 3" and content[1].getpixel((0, 0)) == (2, 0, 0)
    for clip, frames, why in [
        ("a.gif", [7], "the frames are 1 to 6"),
        (names, [4, 1], "the frames are 1 to 3"),
        ("a.gif", [0], "from 1 on"),
        ("a.gif", [], "1 to 8 numbers"),
        ("a.gif", list(range(1, 20)), "1 to 8 numbers"),
        ("b.gif", [1], "no file"),
        ("../a.gif", [1], "outside"),
        (["0.png", "/etc/passwd"], [2], "outside"),
    ]:
        content, error, _ = call(box, {"clip": clip}, [], "select_frames", {"frames": frames})
        assert error in ("bad_frame", "bad_image") and why in content


def test_frames_of_a_video_and_nothing_that_only_calls_itself_one(tmp_path):
    av = pytest.importorskip("av", reason="no PyAV here: pip install av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(5):
            picture = Image.new("RGB", (64, 48), (50 * number, 0, 0))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")
    box = Toolbox(["select_frames"], options=[f"select_frames.folder={tmp_path}"])
    content, error, _ = call(box, {"clip": "a.mp4"}, [], "select_frames", {"frames": [4]})
    assert error is None and abs(content[1].getpixel((30, 20))[0] - 150) < 20
    for clip, why in [("list.mp4", "is broken"), ("../a.mp4", "no file"), ("b.mp4", "no file")]:
        content, error, _ = call(box, {"clip": clip}, [], "select_frames", {"frames": [1]})
        assert error == "bad_image" and why in content


# -- 2,000 random calls


def random_sources(chance):
    """Files as they come: good, odd, broken and hostile ones."""
    noise = Image.effect_noise((90, 70), 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    good = [
        encoded(noise.convert("RGB"), "JPEG", exif=exif),
        encoded(noise.convert("P")),
        encoded(noise.convert("RGBA")),
        encoded(noise.convert("LA")),
        encoded(noise.convert("CMYK"), "JPEG"),
        encoded(noise.convert("1"), "TIFF"),
        encoded(Image.new("RGB", (1, 1))),
        encoded(Image.new("RGB", (90, 1))),
        encoded(Image.new("RGB", (800, 450), "white")),
        animation("GIF"),
        animation("WEBP"),
    ]
    cut = [data[: chance.randrange(len(data))] for data in good]
    hostile = [
        giant_png(20_000, 20_000),
        encoded(Image.new("L", (3000, 2))),
        b"<svg/>",
        b"",
        bytes(chance.randrange(256) for _ in range(500)),
    ]
    return good, [*cut, *hostile]


def random_value(chance):
    """What a model may write where a number or a list of numbers is wanted."""
    number = chance.choice([0, 1, 2, 3, 500, 1000, 1001, -1, 250.5, 1e308, -1e308, 10**400])
    odd = [math.nan, math.inf, -math.inf, "12", "", None, True, [], {}, "NaN", [[1]], "\ud800"]
    return chance.choice(odd) if chance.random() < 0.3 else number


def random_arguments(chance, name):
    names = {
        "crop": "image box",
        "zoom": "image box",
        "draw_box": "image box",
        "rotate": "image degrees",
        "draw_line": "image start end",
        "draw_horizontal": "image y",
        "draw_vertical": "image x",
        "mark_point": "image point",
        "select_frames": "frames",
    }
    lengths = {"box": 4, "start": 2, "end": 2, "point": 2, "frames": 2}
    arguments = {}
    for argument in names[name].split():
        if chance.random() < 0.05:
            continue  # missing
        if argument == "image":
            value = chance.choice([1, 1, 1, 1, 2, 3, 0, -1, 10**400])
        elif argument in lengths and chance.random() < 0.8:
            highest = 7 if argument == "frames" else 1001
            value = sorted(chance.randrange(highest) for _ in range(lengths[argument]))
        elif argument in ("y", "x", "degrees") and chance.random() < 0.7:
            value = chance.uniform(0, 1000)
        else:
            value = random_value(chance)
            if chance.random() < 0.5:
                value = [random_value(chance) for _ in range(chance.randrange(6))]
        arguments[argument] = value
    if chance.random() < 0.05:
        arguments["colour"] = "blue"
    return arguments


def test_two_thousand_random_calls_give_an_image_or_a_clear_observation(tmp_path):
    """Issue 14, 3: bad boxes, NaN, strings for numbers, giant, truncated, EXIF, palettes, alpha,
    animated, SVG. None raises: an exception of a tool would have the kind "exception"."""
    chance = random.Random(14)
    good, bad = random_sources(chance)
    paths = []
    for number, data in enumerate([*good, *bad]):
        paths.append(f"{number}.bin")
        (tmp_path / paths[-1]).write_bytes(data)
    options = [f"select_frames.folder={tmp_path}"]
    boxes = [Toolbox(LOOKING, options=options)]
    pixels = [f"{name}.coordinates=pixels" for name in LOOKING if name != "select_frames"]
    boxes.append(Toolbox(LOOKING, options=options + pixels))
    before = peak_memory()
    counts = {"image": 0, "observation": 0, "not opened": 0}
    kinds = set()

    async def act(session):
        name = chance.choice(LOOKING)
        content, error, _ = await session.call(name, random_arguments(chance, name))
        if error is None:
            shown = [part for part in content if isinstance(part, Image.Image)]
            assert shown and all(image.mode == "RGB" for image in shown)
            assert all(min(image.size) >= 1 for image in shown)
            assert all(image.width * image.height <= MAX_PIXELS for image in shown)
            counts["image"] += 1
        else:
            assert content.startswith("error: ") and "\n" not in content, content
            assert error != "exception", (name, content)
            assert 20 < len(content) < 500
            counts["observation"] += 1
            kinds.add(error)

    async def scene():
        for _ in range(500):
            # 1. a trajectory with some images; those that cannot be opened are told why
            pictures = []
            for data in chance.sample([*good, *good, *bad], 3):
                try:
                    picture = open_image(data)
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 400
                    counts["not opened"] += 1
                else:
                    shown = (max(1, picture.width // 2), max(1, picture.height // 2))
                    pictures.append(Picture(picture, picture.resize(shown)))

            # 2. four calls at once
            clip = chance.choice([*paths, paths[:5], None])
            session = chance.choice(boxes).open({"clip": clip}, pictures)
            await asyncio.gather(*(act(session) for _ in range(4)))
            await session.close()

    asyncio.run(scene())
    assert counts["image"] + counts["observation"] == 2000
    assert min(counts.values()) > 300, counts
    expected = {"bad_arguments", "bad_box", "bad_point", "bad_angle", "bad_frame", "bad_image"}
    assert kinds == expected | {"no_image"}
    assert peak_memory() - before < 400e6
