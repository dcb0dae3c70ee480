"""Verified bytes from the Hugging Face hub, through huggingface-hub, which is an extra.

It is not in the base install because it requires hf-xet, a Rust extension without a wheel for Termux: a phone would
need a Rust compiler to install a package that it can do without.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from fwdllama.download import Progress, Report, commit, sha256_of
from fwdllama.errors import ModelError


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hugging Face hub at one commit, as the hub describes it."""

    repo: str
    file: str
    commit: str
    size_bytes: int
    sha256: str
    licence: str


def describe_hub_file(repo: str, file: str) -> HubFile:
    """What the hub says about a file: commit, size, SHA-256 and licence.

    Raises:
        ModelError: huggingface-hub is not installed, the hub cannot be reached, or it has no such file.
    """
    hub = _hub(repo)
    try:
        info = hub.HfApi(endpoint=_mirror()).model_info(repo, files_metadata=True, timeout=30)
    except Exception as error:  # whatever the HTTP library of the installed version raises
        raise _hub_failure(f"hf:{repo}", error) from error
    found = next((each for each in info.siblings or () if each.rfilename == file), None)
    if found is None:
        offered = sorted(each.rfilename for each in info.siblings or () if each.rfilename.endswith(".gguf"))
        raise ModelError(
            f"hf:{repo}/{file}: the repository has no such file; its GGUF files are {', '.join(offered) or 'none'}."
        )
    if found.lfs is None or found.size is None:
        raise ModelError(f"hf:{repo}/{file}: the hub gives no SHA-256 for this file, so it cannot be verified.")
    licence = (info.card_data.get("license") if info.card_data else None) or "unknown licence"
    return HubFile(repo, file, info.sha, found.size, found.lfs.sha256, str(licence))


def download_hub_file(described: HubFile, target: Path, report: Report) -> None:
    """Download exactly the described bytes to `target`; an interrupted download continues where it stopped.

    Raises:
        ModelError: the hub cannot be reached, or delivers other bytes.
    """
    hub = _hub(described.repo)
    name = f"hf:{described.repo}/{described.file}"
    staging = target.parent / "incomplete"
    try:
        arrived = Path(
            hub.hf_hub_download(
                described.repo,
                described.file,
                revision=described.commit,
                local_dir=staging,
                endpoint=_mirror(),
                tqdm_class=_bar(f"Downloading {name}", report),
            )
        )
    except Exception as error:  # as above; ENOSPC and Ctrl-C among them keep the partial file
        raise _hub_failure(name, error) from error
    found = sha256_of(arrived)
    if found != described.sha256:
        arrived.unlink()
        raise ModelError(f"{name}: the downloaded file has SHA-256 {found}, but the hub promised {described.sha256}.")
    commit(arrived, target)
    shutil.rmtree(staging, ignore_errors=True)


def _mirror() -> str | None:
    """`$HF_ENDPOINT` as it is now: huggingface-hub itself reads it once, when it is imported."""
    return os.environ.get("HF_ENDPOINT")


def _hub(repo: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            f"hf:{repo}: downloading from the Hugging Face hub needs huggingface-hub; install it with "
            "`pip install 'fwdllama[hub]'`, or download the file yourself and give its path."
        ) from error
    return huggingface_hub


def _hub_failure(name: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ModelError(
        f"{name}: the Hugging Face hub could not deliver it ({reason}). Check the name and the network; a private or "
        "gated repository needs HF_TOKEN. What was already downloaded is kept."
    )


def _bar(text: str, report: Report) -> type[Any]:
    """A tqdm that reports instead of drawing: the only hook that huggingface-hub offers."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]  # not subscriptable at run time
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "file": StringIO(), "disable": False})

        def display(self, *args: Any, **options: Any) -> None:
            report(Progress(text, int(self.n), int(self.total or 0)))

    return Bar
