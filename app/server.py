"""The app as a whole: the page, the programmatic side, and the server in front of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: nothing phones home

import gradio as gr
from starlette.middleware import Middleware

from raftdiff.build import default_device
from raftdiff.config import RewardConfig
from raftdiff.errors import StorageError

from . import pages
from .api import add_endpoints
from .arena import Arena
from .arena_tab import ArenaTab
from .compare_tab import CompareTab
from .models import Models
from .opening import Opening, open_on
from .runs import Runs
from .runs_tab import RunsTab
from .security import Guard, allowed_hosts, checks, login_for
from .votes import Votes
from .widgets import PRIVATE, html

VOTES = "votes.sqlite"
PORTS = range(7860, 7960)
SECONDS = 2  # between looks at the line before the device


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """What the command line says."""

    runs: Path = Path("runs")
    base: str | None = None
    loras: Sequence[str] = ()
    rewards: Sequence[RewardConfig] = ()
    prompts: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    """The first free one from 7860 on, if absent."""
    allow_hosts: Sequence[str] = field(default=())


def serve(config: AppConfig, *, say: Callable[[str], None] = print) -> None:
    """Load everything and serve until Ctrl-C.

    Raises:
        ConfigError: an address beyond this machine without a login, or a setting that does not fit.
        StorageError: the port is taken.
        RaftdiffError: the base, a LoRA, a reward or prompts cannot be loaded.
    """
    with ExitStack() as stack:
        page, url = start(config, stack, say=say)
        say(f"open {url}  (Ctrl-C stops)")
        page.block_thread()


def start(config: AppConfig, stack: ExitStack, *, say: Callable[[str], None] = print) -> tuple[gr.Blocks, str]:
    """The running page and its address; it ends with the stack."""
    login = login_for(config.host)
    port = config.port or _free_port(config.host)
    hosts = allowed_hosts(config.host, port, config.allow_hosts)
    runs = Runs(config.runs)
    device = default_device()
    opening = open_on(
        runs, base=config.base, loras=config.loras, rewards=config.rewards, prompts=config.prompts, device=device
    )
    say(f"loading {opening.model.path} on {device}, with {', '.join(lora.name for lora in opening.loras) or 'no LoRA'}")
    models = Models(opening.model, opening.loras, opening.rewards, device=device)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raftdiff-app-")))
    served = folder.resolve() / "served"
    os.environ["GRADIO_TEMP_DIR"] = str(served)  # what the page was shown goes when the app does
    page = build_page(models, opening, runs, Votes(config.runs / VOTES), folder, device=device)
    page.queue(default_concurrency_limit=None, max_size=64)
    try:
        page.launch(
            server_name=config.host,
            server_port=port,
            auth=checks(login) if login else None,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            show_error=False,
            footer_links=[],
            max_file_size=1,
            theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=pages.CSS.read_text(encoding="utf-8"),
            js=pages.JS.read_text(encoding="utf-8"),
            app_kwargs={
                "middleware": [Middleware(Guard, hosts=hosts, served=str(served))],
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
        )
    except OSError as error:
        raise StorageError(f"port {port} of {config.host} cannot be opened ({error}); give another --port") from error
    stack.callback(page.close, verbose=False)
    stack.callback(models.turns.close)
    return page, f"http://{'localhost' if config.host in ('0.0.0.0', '::') else config.host}:{port}/"


def build_page(models: Models, opening: Opening, runs: Runs, votes: Votes, folder: Path, *, device: str) -> gr.Blocks:
    """The three tabs and the endpoints."""
    notes = [*opening.notes, *models.differing()]
    arena = Arena(models, votes, opening.prompts, opening.suggested.drawing)

    def header() -> str:
        turns = models.turns
        return pages.header(opening.model.path, device, busy=turns.busy, waiting=turns.waiting, notes=notes)

    with gr.Blocks(title="raftdiff", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        head = html(header(), id="rd-header")
        gr.on([page.load, gr.Timer(SECONDS).tick], header, None, head, **PRIVATE)
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                CompareTab(models, opening.suggested, folder).build(page)
            with gr.Tab("Arena", id="arena") as tab:
                ArenaTab(arena, folder).build(page, tab)
            with gr.Tab("Runs", id="runs") as tab:
                RunsTab(runs).build(page, tab)
        add_endpoints(models, arena)
    return page


def _free_port(host: str) -> int:
    import socket

    for port in PORTS:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise StorageError(f"no port of {host} from {PORTS[0]} to {PORTS[-1]} is free; give --port")
