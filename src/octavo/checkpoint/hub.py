"""Fetch published files from the Hugging Face Hub into a models tree.

`plan` asks the hub for each file's size and hash and looks at what is here already; `fetch` brings one file. A
download grows in `<name>.<hash>.incomplete` beside its place and moves there, atomically, once its hash is proven:
what carries a file's final name is whole. A later run goes on where the last one stopped.

`huggingface_hub` speaks the protocol. Its own `hf_hub_download` throws an interrupted download away (since 1.18), so
resuming is done here. It is imported where it is used, for it takes its time. `releases` has the names.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from octavo.checkpoint.releases import PublishedFile
from octavo.errors import DownloadError

OFFICIAL_ENDPOINT = "https://huggingface.co"
SHA256 = re.compile(r"[0-9a-f]{64}")  # the hub's hash of a large file
GIT_SHA1 = re.compile(r"[0-9a-f]{40}")  # and of a small one: git's object name

# ComfyUI's older name of a folder, still found in many trees.
OLDER_FOLDERS = {"text_encoders": "clip", "diffusion_models": "unet"}

Report = Callable[[str], object]


def quiet(text: str) -> None:
    """Report to nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """One file to bring, as the hub described it when asked."""

    file: PublishedFile
    url: str  # of the commit that was current then
    bytes: int
    digest: str  # as SHA256 or GIT_SHA1
    target: Path

    @property
    def part(self) -> Path:
        """Where the download grows; named after the content, so that two versions are never mixed."""
        return self.target.with_name(f"{self.target.name}.{self.digest[:12]}.incomplete")

    @property
    def held(self) -> int:
        """Bytes that earlier runs brought already."""
        return self.part.stat().st_size if self.part.exists() else 0

    @property
    def missing(self) -> int:
        """Bytes still to come."""
        return max(0, self.bytes - self.held)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is here already, and what must be brought."""

    present: tuple[Path, ...]
    downloads: tuple[Download, ...]


def plan(
    files: Iterable[PublishedFile],
    models_dir: Path,
    *,
    token: str | None = None,
    replace: bool = False,
    report: Report = quiet,
) -> Plan:
    """Compare what the hub has with what is in `models_dir`; fetches and changes nothing.

    Args:
        files: what is wanted; the same file twice counts once.
        models_dir: root of a tree laid out as ComfyUI's; it need not exist yet.
        token: for gated repositories; None means HF_TOKEN or the login of `hf auth login`.
        replace: bring a file although another one of its name is here.
        report: told what takes a while.

    Raises:
        DownloadError: the hub cannot be reached or refuses, a different file of that name is here, or the disk is
            too small for all that is missing.
    """
    present: list[Path] = []
    downloads: list[Download] = []
    for file in dict.fromkeys(files):
        with _explained(file, token):
            download = _ask(file, models_dir, token)
            here = _already_here(download, models_dir, report)
        if here is not None:
            present.append(here)
            continue
        if download.target.exists() and not replace:
            raise DownloadError(
                f"{download.target} is here, but it is not the published file (whose size is {download.bytes} bytes "
                f"and whose hash begins with {download.digest[:12]}). Move it away, or replace it with --force."
            )
        downloads.append(download)
    _check_free_space(downloads)
    return Plan(present=tuple(present), downloads=tuple(downloads))


def fetch(download: Download, *, token: str | None = None, report: Report = quiet) -> Path:
    """Bring one file, going on from what an earlier run brought; returns its place.

    Shows huggingface_hub's progress bar on a terminal's stderr.

    Raises:
        DownloadError: the hub refuses or the connection breaks for good, the disk is full, or the content does not
            have the published hash. Nothing stands at `download.target` then but what stood there before; unless
            the hash is wrong, what was brought is kept for the next run.
    """
    part = download.part
    with _explained(download.file, token):
        part.parent.mkdir(parents=True, exist_ok=True)
        with _only_here(download):
            if download.held > download.bytes:
                part.unlink()
            _stream(download, token)
            report(f"Checking {download.file.name}")
            if _digest(part, download.digest) != download.digest:
                part.unlink()
                raise DownloadError(
                    f"What came for {download.file.name} does not have the published hash {download.digest}: it was "
                    f"damaged on the way and is thrown away. Run the same command again."
                )
            part.replace(download.target)
            for outdated in part.parent.glob(f"{download.target.name}.*.incomplete"):
                outdated.unlink()
    return download.target


def places(file: PublishedFile, models_dir: Path) -> list[Path]:
    """Where a models tree may have the file: first where `fetch` puts it, then where older trees keep its kind."""
    folders = file.folder, OLDER_FOLDERS.get(file.folder, file.folder)
    return [models_dir / folder / file.name for folder in dict.fromkeys(folders)]


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT as it is now (huggingface_hub looks only when it is imported), or the official."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or OFFICIAL_ENDPOINT


def _ask(file: PublishedFile, models_dir: Path, token: str | None) -> Download:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(file.repo, file.path, endpoint=endpoint())
    published = get_hf_file_metadata(url, token=_token(token) or False, endpoint=endpoint())
    digest = published.etag or ""
    if published.size is None or not (SHA256.fullmatch(digest) or GIT_SHA1.fullmatch(digest)):
        raise DownloadError(
            f"{endpoint()} tells neither size nor hash of {file.repo}/{file.path}, so a download could not be "
            f"proven. Is HF_ENDPOINT a mirror of the Hugging Face Hub? Without it, {OFFICIAL_ENDPOINT} is used."
        )
    return Download(
        file=file,
        url=hf_hub_url(file.repo, file.path, revision=published.commit_hash, endpoint=endpoint()),
        bytes=published.size,
        digest=digest,
        target=places(file, models_dir)[0],
    )


def _already_here(download: Download, models_dir: Path, report: Report) -> Path | None:
    for path in places(download.file, models_dir):
        if path.is_file() and path.stat().st_size == download.bytes:
            report(f"Checking {path}")
            if _digest(path, download.digest) == download.digest:
                return path
    return None


def _check_free_space(downloads: Iterable[Download]) -> None:
    """Per disk, since folders of a models tree are often links to another one."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for download in downloads:
        place = next(folder for folder in download.target.absolute().parents if folder.is_dir())
        device = place.stat().st_dev
        places[device] = place
        needed[device] = needed.get(device, 0) + download.missing
    for device, place in places.items():
        free = shutil.disk_usage(place).free
        if needed[device] > free:
            raise DownloadError(
                f"The disk of {place} has {free / 1e9:.2f} GB free, but {needed[device] / 1e9:.2f} GB are to come. "
                f"Make room, or choose another disk with --models-dir."
            )


def _stream(download: Download, token: str | None) -> None:
    """Append to `download.part` until it has all bytes."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils._headers import build_hf_headers

    # Compressed on the way, a file has other byte positions than those we would go on from.
    headers = build_hf_headers(token=_token(token) or False) | {"Accept-Encoding": "identity"}
    while (held := download.held) < download.bytes:
        try:
            with download.part.open("ab") as part, _hushed("huggingface_hub.file_download"):
                http_get(
                    download.url,
                    part,
                    resume_size=held,
                    headers=headers,
                    expected_size=download.bytes,
                    displayed_filename=download.file.name,
                )
        except HfHubHTTPError:
            raise
        except (_transport_error(), OSError):
            # A line that breaks again and again, yet brings something each time, gets there in the end.
            if download.held <= held:
                raise
    with download.part.open("rb") as part:
        os.fsync(part.fileno())  # before the move, or a power cut could leave an empty file under the final name


def _digest(path: Path, like: str) -> str:
    """The hash of a file, in the form that `like` has."""
    with path.open("rb") as file:
        if SHA256.fullmatch(like):
            return hashlib.file_digest(file, "sha256").hexdigest()
        header = b"blob %d\0" % path.stat().st_size
        return hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


@contextmanager
def _only_here(download: Download) -> Iterator[None]:
    """Hold off a second process that would append to the same file."""
    from filelock import FileLock, Timeout

    place = download.part.with_suffix(".lock")
    try:
        with FileLock(place, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows deletes no open file; an empty one does no harm
                    place.unlink()
    except Timeout as taken:
        raise DownloadError(
            f"Another octavo pull is fetching {download.file.name} into the same folder; wait for it, or stop it."
        ) from taken


@contextmanager
def _hushed(logger: str) -> Iterator[None]:
    """Without the warnings of a logger: here, two lines for each time that a connection is taken up again."""
    noisy = logging.getLogger(logger)
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


def _token(given: str | None) -> str | None:
    from huggingface_hub import get_token

    return given or get_token()


def _transport_error() -> type[Exception]:
    """The base of what the HTTP library beneath huggingface_hub raises: httpx or httpx2, by the hub's version."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


@contextmanager
def _explained(file: PublishedFile, token: str | None) -> Iterator[None]:
    """Turn what can go wrong on the way to `file` into one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    kept = "What was brought so far is kept: the same command goes on from there."
    try:
        yield
    except HfHubHTTPError as refused:
        status = refused.response.status_code
        raise DownloadError(_refusal(file, status, has_token=_token(token) is not None)) from refused
    except OfflineModeIsEnabled as offline:
        raise DownloadError(
            f"HF_HUB_OFFLINE is set, so {file.name} cannot be fetched. Unset it, or bring the file from "
            f"{endpoint()}/{file.repo} yourself into the models folder '{file.folder}'."
        ) from offline
    except _transport_error() as broken:
        raise DownloadError(
            f"No connection to {endpoint()} for {file.name} ({_first_line(broken)}). Check the network and its proxy; "
            f"HF_ENDPOINT can name a mirror. {kept}"
        ) from broken
    except OSError as failed:
        if failed.errno == errno.ENOSPC:
            text = f"The disk is full: {file.name} does not fit. Make room. {kept}"
        elif failed.filename is not None:
            text = (
                f"Cannot write {failed.filename} ({failed.strerror}). Check the folder's permissions, or choose "
                f"another one with --models-dir."
            )
        else:
            text = f"{file.name} did not come through ({_first_line(failed)}). {kept}"
        raise DownloadError(text) from failed


def _refusal(file: PublishedFile, status: int, *, has_token: bool) -> str:
    page = f"{endpoint()}/{file.repo}"
    match status, has_token:
        case 401, False:
            return (
                f"{file.repo} wants to know who you are: accept its licence at {page}, make a token at "
                f"{endpoint()}/settings/tokens, and give it as --token, in HF_TOKEN, or once with 'hf auth login'."
            )
        case 401, True:
            return (
                f"The hub does not accept the token for {file.repo}: it is mistyped or has expired. Make another one "
                f"at {endpoint()}/settings/tokens, and give it as --token, in HF_TOKEN, or with 'hf auth login'."
            )
        case 403, _:
            return (
                f"The token's account has no access to {file.repo}: accept its licence at {page} (or give the token "
                f"the right to read gated repositories), then run the same command again."
            )
        case 404, _:
            return (
                f"{file.repo} has no file {file.path} (404): it was moved or withdrawn. Look at {page}, and "
                f"put what you find there into the models folder '{file.folder}'."
            )
        case 429, _:
            return f"{endpoint()} asks to slow down (429). Wait some minutes, then run the same command again."
        case _:
            return (
                f"{endpoint()} answered {status} for {file.repo}/{file.path}. If it stays so, look at {page}; what "
                f"was brought so far is kept, and the same command goes on from there."
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
