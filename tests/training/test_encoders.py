"""Encoders: token layout, equivariance of the filter bank, access to weights, the cache."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import traceback

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from sparsity_trap import encoders, filterbank, presets
from sparsity_trap import settings as config
from sparsity_trap.settings import Encoder, UserError

TOKEN = "hf_not-for-anyones-eyes"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two smooth random images, uint8 [2, 224, 224, 3]."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 28, 28, generator=draw)
    fine = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic")
    return (fine.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)


def test_dihedral_gives_all_eight_elements_once():
    square = torch.arange(9).view(3, 3)
    seen = {tuple(encoders.dihedral(square, e, (0, 1)).flatten().tolist()) for e in range(8)}
    assert len(seen) == 8
    assert encoders.dihedral(square, 0, (0, 1)).equal(square)


def test_filterbank_tokens_turn_with_the_image(images):
    encoder = encoders.load_encoder("filterbank")
    tokens = encoder(images)
    assert tokens.shape == (2, encoder.channels, 16, 16)
    assert torch.isfinite(tokens).all()
    # Channels after the 4 × quarter channels describe whole tokens; they turn with the grid.
    whole = slice(4 * encoder.responses, None)
    for element in range(1, 8):
        expected = encoder(encoders.dihedral(images, element, (1, 2)))
        grid = encoders.dihedral(tokens, element, (2, 3))
        torch.testing.assert_close(grid[:, whole], expected[:, whole], atol=2e-4, rtol=1e-3)
        turned = encoder.turned(tokens, lambda x, e=element: encoders.dihedral(x, e, (-2, -1)))
        torch.testing.assert_close(turned, expected, atol=2e-4, rtol=1e-3)


def test_filterbank_separates_the_stains():
    """Pure haematoxylin shows in the first stain channel and not in eosin, and vice versa."""
    encoder = encoders.load_encoder("filterbank")
    for stain, other, vector in ((0, 1, filterbank._HAEMATOXYLIN), (1, 0, filterbank._EOSIN)):
        colour = 256 * torch.exp(-torch.tensor(vector)) - 1
        tokens = encoder(colour.round().byte().expand(1, 224, 224, 3))
        quarters = tokens[0, : 4 * 31].view(31, 4, 16, 16).mean((1, 2, 3))
        assert quarters[stain] > 0.9 and abs(quarters[other]) < 0.05


@pytest.mark.parametrize(
    ("name", "prefix", "width"),
    [
        ("virchow2", 5, 1280),
        ("uni2-h", 9, 1536),
        ("kaiko-vitl14", 5, 1024),
        ("phikon", 1, 768),
        ("lunit-vits8", 1, 384),
        ("timm:vit_tiny_patch16_224", 1, 192),
    ],
)
def test_tokens_leave_prefix_tokens_out(images, name, prefix, width):
    """Two blocks of the architecture with random weights, against timm's own feature maps."""
    torch.manual_seed(0)
    encoder = encoders.TimmTokens(name, pretrained=False, depth=2)
    assert encoder.model.num_prefix_tokens == prefix
    with torch.inference_mode():
        tokens = encoder(images)
        normalised = (images.permute(0, 3, 1, 2) / 255 - encoder.mean) / encoder.std
        grid = encoder.model.forward_intermediates(
            normalised, indices=1, norm=True, intermediates_only=True
        )[0]
    assert tokens.shape == (2, width, 16, 16) and tokens.dtype == torch.float32
    patch = encoder.model.patch_embed.patch_size[0]
    assert grid.shape[-1] == 224 // patch
    if patch != 14:
        grid = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(tokens, grid, atol=1e-4, rtol=1e-4)


def test_register_tokens_do_not_reach_the_grid(images):
    """Tokens come from the last places of the sequence: a mark put on each prefix stays away."""
    encoder = encoders.TimmTokens("virchow2", pretrained=False, depth=1)
    model = encoder.model
    with torch.inference_mode():
        sequence = model.forward_features(torch.zeros(1, 3, 224, 224))
        assert sequence.shape == (1, 5 + 256, 1280)
        model.forward_features = lambda x: torch.arange(261.0).view(1, 261, 1).expand(-1, -1, 1280)
        tokens = encoder(images[:1])
    assert tokens[0, 0].flatten().tolist() == list(range(5, 261))


def test_virchow2_whole_without_memory():
    """The token grid of the full model, on the meta device."""
    with torch.device("meta"):
        encoder = encoders.TimmTokens("virchow2", pretrained=False)
        tokens = encoder(torch.empty(3, 224, 224, 3, dtype=torch.uint8))
    assert tokens.shape == (3, 1280, 16, 16) and encoder.channels == 1280


def test_virchow2_parameters_add_up():
    """Every weight of the published architecture, counted by hand."""
    width, depth, hidden = 1280, 32, int(1280 * 5.3375)
    attention = 4 * (width * width + width)
    gated_mlp = width * hidden + hidden + hidden // 2 * width + width
    block = attention + gated_mlp + 2 * 2 * width + 2 * width  # two norms, two layer scales
    places = 1 + 4 + 256  # class, registers, patches: each has a position
    embedding = 3 * 14 * 14 * width + width + (1 + 4 + places) * width
    with torch.device("meta"):
        model = encoders.TimmTokens("virchow2", pretrained=False).model
    assert sum(p.numel() for p in model.parameters()) == embedding + depth * block + 2 * width


def test_unknown_encoder_names_the_choices():
    with pytest.raises(UserError, match="'no_such'.*filterbank.*virchow2.*timm:<name>"):
        encoders.load_encoder("no_such")


@pytest.mark.parametrize("name", ["timm:no_such_vit", "timm:resnet18"])
def test_other_models_of_timm_are_refused(name):
    with pytest.raises(UserError, match=f"'{name}'.*: name a Vision Transformer"):
        encoders.TimmTokens(name, pretrained=False)


class Hub(http.server.ThreadingHTTPServer):
    """Stands in for Hugging Face: serves ``files``, or answers ``status`` to everything."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.status, self.headers = 404, {}
        self.asked: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self, body=True):
        self.server.asked.append(self.headers["Authorization"])
        content = self.server.files.get(self.path.rpartition("/")[2])
        if content is None:
            self.send_response(self.server.status)
            headers = self.server.headers | {"Content-Length": "0"}
        else:
            self.send_response(200)
            headers = {
                "Content-Length": str(len(content)),
                "ETag": f'"{abs(hash(content))}"',
                "X-Repo-Commit": "0" * 40,
            }
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body and content is not None:
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *_):
        pass


def point_to(address, monkeypatch):
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hugging Face with an empty cache and no token."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    point_to(server.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(variable, raising=False)
    yield server
    server.shutdown()
    server.server_close()


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access is restricted. {TOKEN}"}
REFUSALS = {
    "gated": (403, GATED, "403, Access is restricted. .*paige-ai/Virchow2 .*HF_TOKEN"),
    "bad token": (401, {"X-Error-Message": "Invalid credentials"}, "401, Invalid credentials"),
    "unknown": (404, {"X-Error-Code": "RepoNotFound"}, "404, "),
}


@pytest.mark.parametrize("ask", [encoders.check_access, encoders.load_encoder])
@pytest.mark.parametrize("case", REFUSALS)
def test_refused_weights(hub, monkeypatch, case, ask):
    hub.status, hub.headers, pattern = REFUSALS[case]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=f"encoder 'virchow2' .{pattern}") as caught:
        ask("virchow2")
    assert encoders.UNGATED in str(caught.value) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, encoders.Unreachable)
    assert hub.asked[-1] == f"Bearer {TOKEN}"
    assert_token_is_nowhere(caught.value)


def assert_token_is_nowhere(error):
    assert error.__cause__ is None and error.__context__ is None
    text = "".join(traceback.format_exception(error)) + repr(error)
    assert TOKEN not in text


@pytest.mark.parametrize("name", ["virchow2", "phikon", "timm:hf-hub:lab/model"])
def test_no_network(hub, monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{unused.getsockname()[1]}", monkeypatch)
        with pytest.raises(encoders.Unreachable, match="connect once.*'filterbank'") as caught:
            encoders.load_encoder(name)
    assert_token_is_nowhere(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(encoders.Unreachable):
        encoders.check_access(name)


def test_access_lost_between_question_and_download(hub, monkeypatch):
    """What timm's own download raises is read in the same way."""
    monkeypatch.setattr(encoders, "check_access", lambda name: None)
    hub.status, hub.headers = 403, GATED
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="refuses.*403") as caught:
        encoders.load_encoder("virchow2")
    assert_token_is_nowhere(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(encoders.Unreachable, match="connect once"):
        encoders.load_encoder("virchow2")


def test_a_hub_in_trouble_is_not_a_refusal(hub):
    hub.status = 503
    with pytest.raises(encoders.Unreachable, match=r"\(503\): connect once or try later"):
        encoders.check_access("virchow2")


def test_other_failures_hide_the_token(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError(f"request with {TOKEN} failed")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(encoders._import_timm(), "create_model", broken)
    monkeypatch.setattr(encoders, "check_access", lambda name: None)
    with pytest.raises(UserError, match=r"RuntimeError: request with \*\*\* failed") as caught:
        encoders.load_encoder("phikon")
    assert_token_is_nowhere(caught.value)


def test_weights_from_the_hub_are_those_it_serves(hub, images, monkeypatch):
    """A model of two blocks on the local hub: loaded whole, then again without the hub."""
    torch.manual_seed(1)
    small = {"depth": 2, "num_classes": 0, "dynamic_img_size": True}
    source = encoders._import_timm().create_model("vit_tiny_patch16_224", **small).eval()
    statistics = {"mean": [0.7, 0.6, 0.5], "std": [0.2, 0.3, 0.25]}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_features": 192,
        "model_args": {"depth": 2},
        "pretrained_cfg": {"input_size": [3, 224, 224], "num_classes": 0, **statistics},
    }
    hub.files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(source.state_dict()),
    }
    name = "timm:hf-hub:lab/model"
    assert not encoders.check_access(name)
    encoder = encoders.load_encoder(name)
    assert encoder.mean.flatten().tolist() == pytest.approx(statistics["mean"])
    for key, value in source.state_dict().items():
        assert encoder.model.state_dict()[key].equal(value), key
    assert encoders.check_access(name, online=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = encoders.load_encoder(name)
    torch.testing.assert_close(again(images), encoder(images))


@pytest.fixture
def store(images, monkeypatch):
    """Three patches in place of a patch store."""

    class Store:
        patient = "P1"

        def __init__(self, path):
            self.images = torch.cat([images, images[:1].flip(1)]).numpy()

        def __len__(self):
            return len(self.images)

    monkeypatch.setattr(encoders, "PatchStore", Store)
    return torch.from_numpy(Store(None).images)


def read(path):
    about = json.loads((path / "about.json").read_text())
    return torch.from_numpy(np.load(path / "tokens.npy")), [tuple(v) for v in about["views"]]


def test_cached_views_are_encodings_of_the_turned_image(store, tmp_path):
    settings = Encoder(name="filterbank", jitter_views=1)
    encoders.cache_tokens(tmp_path / "store", tmp_path / "tokens", settings)
    tokens, views = read(tmp_path / "tokens")
    assert tokens.shape[:2] == (3, 16) and views == encoders.views(settings)
    assert json.loads((tmp_path / "tokens" / "about.json").read_text())["encoder"] == "filterbank"
    encoder = encoders.load_encoder("filterbank")
    for element in (0, 3, 6):
        expected = encoder(encoders.dihedral(store, element, (1, 2))).half()
        torch.testing.assert_close(tokens[:, views.index((0, element))], expected)
    assert not tokens[:, views.index((0, 0))].equal(tokens[:, views.index((1, 0))])
    assert not list(tmp_path.glob(".*"))


def test_views_may_come_in_any_order(images):
    """Each turn is that of its own copy, jittered or not."""
    each = [(1, 3), (0, 2), (1, 0), (0, 0)]
    found = encoders._views_of(images[0], each, lambda patch: patch // 2)
    for view, (jitter, turn) in zip(found, each, strict=True):
        copy = images[0] // 2 if jitter else images[0]
        assert view.equal(encoders.dihedral(copy, turn, (0, 1)))


def test_tokens_of_another_encoder_or_of_other_views_are_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    preset = presets.load_preset("smoke")
    encoders.cache_tokens(tmp_path, preset.tokens("P1"), preset.encoder)
    tokens, views = encoders.open_tokens(preset, "P1")
    assert tokens.shape[:2] == (3, len(views)) and tokens.dtype == np.float16
    for change in ({"name": "virchow2"}, {"dihedral": False}):
        other = preset.encoder.model_copy(update=change)
        with pytest.raises(UserError, match="of encoder 'filterbank' in 8 views.*again"):
            encoders.open_tokens(preset.model_copy(update={"encoder": other}), "P1")


def test_cache_does_not_depend_on_the_batch(store, tmp_path):
    """The colour jitter too: its draws follow patches, not batches."""
    settings = Encoder(name="filterbank", dihedral=False, jitter_views=2)
    for batch in (1, 6, 100):
        path = tmp_path / f"{batch}"
        encoders.cache_tokens(tmp_path, path, settings, seed=3, batch=batch)
    one, six, all_of_them = (read(tmp_path / f"{batch}")[0] for batch in (1, 6, 100))
    assert one.shape[:2] == (3, 3)
    torch.testing.assert_close(one, six)
    torch.testing.assert_close(one, all_of_them)


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_tokens_that_float16_cannot_hold_stop_the_cache(store, tmp_path, monkeypatch, value):
    class Wild(torch.nn.Module):
        channels = 2

        def forward(self, images):
            return torch.full((len(images), 2, 16, 16), value)

    monkeypatch.setattr(encoders, "load_encoder", lambda name: Wild())
    with pytest.raises(UserError, match="'filterbank'.*float16"):
        encoders.cache_tokens(tmp_path, tmp_path / "tokens", Encoder())
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tokens_agree_with_those_of_the_cpu(images):
    torch.manual_seed(0)
    encoder = encoders.TimmTokens("virchow2", pretrained=False, depth=2)
    with torch.inference_mode():
        expected = encoder(images)
        tokens = encoder.cuda()(images.cuda()).cpu()
    assert (tokens - expected).abs().mean() < 0.02 * expected.abs().mean()
    assert encoders._images_at_once(encoder, torch.device("cuda")) > 8
