"""Local folders and URLs: links, hard links, second writers, secrets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from exchanging import Model, start

from gap_ds.parallel import ParallelWorker
from gap_ds.parallel.transport import open_folder, without_secrets


def test_a_second_job_of_one_worker_does_not_publish_what_the_first_has_half_written(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path))
    first, second = (folder.stream("round_0/worker_0.safetensors") for _ in range(2))
    first.write(b"half")
    second.write(b"whole")
    second.close()
    assert (tmp_path / "round_0" / "worker_0.safetensors").read_bytes() == b"whole"
    with pytest.raises(OSError, match="another process has written it in the meantime"):
        first.close()
    assert [path.read_bytes() for path in (tmp_path / "round_0").iterdir()] == [b"whole"]


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    start(str(tmp_path), 0)
    start(str(tmp_path), 1)
    with pytest.raises(ValueError, match="another run"):
        start(str(tmp_path), 1, fingerprint="def")
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("sftp://me:secret@host/run", "sftp://host/run"),
        ("https://me@host/run?sig=secret&x=1", "https://host/run"),
        ("simplecache::https://host/run?sig=secret", "simplecache::https://host/run"),
        ("GET https://a:b@host/run?sig=secret failed (403)", "GET https://host/run failed (403)"),
        ("runs/a@b/what?/exchange", "runs/a@b/what?/exchange"),
    ],
)
def test_what_is_secret_in_a_url_is_not_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown == ParallelWorker(0, url).shown


def test_an_error_of_a_remote_folder_does_not_tell_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    job = start("memory://secrets/exchange", 0)

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("403 Forbidden: https://host/run.json?sig=secret")

    monkeypatch.setattr(type(job._folder._system), "cat_file", refused)
    with pytest.raises(ValueError, match=r"RuntimeError: 403 Forbidden: https://host/run.json\)") as caught:
        start("memory://secrets/exchange", 1)
    assert "secret)" not in str(caught.value)


def test_links_do_not_lead_writes_out_of_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "exchange", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    job, model = start(str(inside), 0), Model(0)
    (inside / "round_0").symlink_to(outside)
    with pytest.raises(ValueError, match="round_0 is a link, and must be a folder"):
        job.publish(0, model.items(), model.bits)
    assert os.listdir(outside) == ["precious"]
    (inside / "round_1").mkdir()
    for name in ("worker_0.safetensors.a.partial", "worker_0.json.b.partial", "worker_0.safetensors"):
        (inside / "round_1" / name).symlink_to(outside / "precious")
    job.publish(1, model.items(), model.bits)
    assert (outside / "precious").read_text() == "precious"
    assert not (inside / "round_1" / "worker_0.safetensors").is_symlink()
