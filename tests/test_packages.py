"""The derived image and installed packages, on real engines, from an index of our own that listens on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import logging
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from conftest import ROOT
from package_index import Index, fill
from pytest_subprocess import FakeProcess
from real_engines import remove_volume

import sandbox_runner
from sandbox_runner import (
    Config,
    DockerConfig,
    Engine,
    PackageConfig,
    PoolConfig,
    RequestError,
    Runner,
    derive_image,
    find_engine,
    open_runner,
    parse_requirement,
    shorten_installer_output,
)

# ── without an engine ──


@pytest.mark.parametrize(
    ("text", "name", "requirement"),
    [
        ("requests", "requests", "requests"),
        ("Foo.Bar_baz", "foo-bar-baz", "Foo.Bar_baz"),
        ("pandas[excel]>=2,<3", "pandas", "pandas[excel]>=2,<3"),
        ("pandas [excel, html] >= 2 , < 3", "pandas", "pandas[excel,html]>=2,<3"),
        ("x==1.0.*", "x", "x==1.0.*"),
        ("x~=1.4.2", "x", "x~=1.4.2"),
    ],
)
def test_a_requirement_is_a_name_with_extras_and_versions(text: str, name: str, requirement: str) -> None:
    assert parse_requirement(text) == (name, requirement)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "-r requirements.txt", "--index-url=http://evil", "-e .", ".", "/tmp/x.whl", "../x", "x.whl/",
        "git+https://example.com/x", "x @ https://example.com/x.whl", "https://example.com/x.whl", "x; rm -rf /",
        "x && y", "$(id)", "`id`", "x\n--index-url=y", "x\x00", "x\ty", "x==1; python_version<'3'", "[extra]", "x[",
        "x>=",         "é", "x" * 400 + "!", "x==" + "1" * 400,
    ],
)  # fmt: skip
def test_anything_else_is_refused_before_something_starts(text: str) -> None:
    with pytest.raises(RequestError, match="is not a package's name"):
        parse_requirement(text)


def test_several_packages_at_once_are_refused_with_the_advice_to_ask_for_one() -> None:
    with pytest.raises(RequestError, match="one package a call"):
        parse_requirement("numpy pandas")


def test_of_an_installers_output_the_telling_lines_are_kept() -> None:
    output = "Resolved 3 packages\n" * 50 + "ERROR: No matching distribution found for nosuch\n" + "bla\n" * 3
    assert shorten_installer_output(output) == "ERROR: No matching distribution found for nosuch"


def test_all_that_apk_says_of_a_failure_is_told() -> None:
    reason = (
        "WARNING: fetching https://mirror.example/main/x86_64/APKINDEX.tar.gz: TLS: server certificate not trusted\n"
        "ERROR: unable to select packages:\n"
        "nosuch (no such package):"
    )
    output = f"fetch https://mirror.example/main/x86_64/APKINDEX.tar.gz\n{reason}\n    required by: world[nosuch]\n"
    assert shorten_installer_output(output) == reason


@pytest.fixture
def index() -> Iterator[Index]:
    """An index with a handful of packages."""
    served = Index()
    fill(served)
    yield served
    served.close()


@pytest.fixture(scope="module")
async def engine(engine_command: str, processes: FakeProcess) -> Engine:
    """The real engine."""
    processes.allow_unregistered(True)  # what is made for a whole module is made before a test's tripwire knows of it
    return await find_engine(engine_command)


@pytest.fixture(scope="module")
async def volume(engine: Engine) -> AsyncIterator[str]:
    """A volume for installed packages of these tests' own, which keeps the installer from being fetched every time."""
    name = f"python-docker-mcp-test-{os.urandom(4).hex()}"
    yield name
    remove_volume(engine.command, name)


@pytest.fixture
async def settings(engine: Engine, index: Index, volume: str) -> AsyncIterator[Config]:
    """Settings with the index, no packages, and a derived image of this test's own."""
    mine = f"alpha<2,!=0.{int.from_bytes(os.urandom(4))}"
    package = PackageConfig(index_url=index.url, network="host", volume=volume, preinstalled=(mine,))
    yield Config(docker=DockerConfig(command=engine.command, image="host", timeout=20), package=package)
    for installer in ("uv", "pip"):
        about = dataclasses.replace(package, installer=installer)
        await remove_image(engine, sandbox_runner.derived_name(sandbox_runner.host_image_name(), about))
    await in_volume(
        engine, volume, "import glob, shutil; [shutil.rmtree(path) for path in glob.glob('/packages/[!.]*')]"
    )


async def in_volume(engine: Engine, volume: str, code: str) -> str:
    """What code prints that may write to a volume."""
    limits = ("--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096")
    mount = f"--mount=type=volume,source={volume},target=/packages"
    image = sandbox_runner.host_image_name()
    return (await engine.run("run", "--rm", *limits, mount, "--entrypoint=python3", image, "-c", code)).strip()


async def remove_image(engine: Engine, name: str) -> None:
    """Remove an image, if it is there. A sandbox that was just being made ready may use it for a minute."""
    with contextlib.suppress(sandbox_runner.EngineError):
        await engine.run("rmi", "--force", name)


def derived_name(config: Config) -> str:
    """The derived image."""
    return sandbox_runner.derived_name(sandbox_runner.host_image_name(), config.package)


def plain(config: Config, **changes: Any) -> Config:
    """The settings with nothing preinstalled."""
    return dataclasses.replace(config, package=dataclasses.replace(config.package, preinstalled=(), **changes))


# ── the derived image ──


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
@pytest.mark.parametrize("installer", ["uv", "pip"])
async def test_the_derived_image_holds_what_is_preinstalled_compiled(
    settings: Config, index: Index, installer: Literal["uv", "pip"]
) -> None:
    settings = dataclasses.replace(settings, package=dataclasses.replace(settings.package, installer=installer))
    status: list[str] = []
    async with open_runner(settings, on_status=status.append) as runner:
        result = await runner.execute(
            "import alpha, os, importlib.util\n"
            "(alpha.__version__, os.path.exists(alpha.__cached__), os.access(alpha.__file__, os.W_OK))"
        )
        assert result.value == "('1.0', True, False)", result
        assert runner.launcher.image is not None
        assert runner.launcher.image.problem is None
        first = runner.launcher.image.id
    building = [line for line in status if "░" in line]
    assert building[0].startswith(f"█░░░░ preparing the image (once; a minute or so): fetching {installer}, for alpha")
    assert all("preparing the image (once; a minute or so): " in line for line in building)
    before = len(index.requests)
    async with open_runner(settings) as runner:
        await runner.execute("1")
        assert runner.launcher.image is not None
        assert runner.launcher.image.id == first
    assert len(index.requests) == before


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_two_that_start_together_build_it_once(settings: Config, engine: Engine) -> None:
    images = []
    status: list[str] = []

    async def derive() -> None:
        images.append(await derive_image(engine, settings, status.append))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(derive)
        tasks.start_soon(derive)
    assert images[0].id == images[1].id
    assert [image.problem for image in images] == [None, None]
    assert len([line for line in status if "saving the image" in line]) == 1
    assert any("waiting for another program" in line for line in status)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_an_older_image_of_the_same_packages_is_removed_and_no_other_servers(
    settings: Config, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = dataclasses.replace(settings, package=dataclasses.replace(settings.package, preinstalled=("gamma",)))
    monkeypatch.setattr(sandbox_runner, "RECIPE", sandbox_runner.RECIPE - 1)
    older = [await derive_image(engine, config, lambda _: None) for config in (settings, others)]
    monkeypatch.undo()
    newer = await derive_image(engine, settings, lambda _: None)
    there = [await engine.inspect("image", image.name, "{{.Id}}") for image in (*older, newer)]
    assert [bool(identity) for identity in there] == [False, True, True]
    await remove_image(engine, older[1].name)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_a_build_killed_half_way_leaves_nothing_and_is_done_again(settings: Config, engine: Engine) -> None:
    program = (
        "import anyio, json, sys, dataclasses; sys.path.insert(0, sys.argv[1]); import sandbox_runner as s\n"
        "c = json.loads(sys.argv[2])\n"
        "p = s.PackageConfig(**{**c, 'preinstalled': tuple(c['preinstalled']), 'trusted_hosts': ()})\n"
        "async def main():\n"
        "    e = await s.find_engine(sys.argv[3])\n"
        "    d = s.DockerConfig(command=sys.argv[3], image='host')\n"
        "    await s.derive_image(e, s.Config(docker=d, package=p), lambda text: print(text, flush=True))\n"
        "anyio.run(main)\n"
    )
    about = json.dumps(dataclasses.asdict(settings.package))
    child = await anyio.open_process([sys.executable, "-c", program, str(ROOT), about, engine.command], stderr=None)
    assert child.stdout is not None
    seen = b""
    with anyio.fail_after(60):
        while b"etching" not in seen and b"ownload" not in seen and b"alpha" not in seen:
            seen += await child.stdout.receive()
    child.send_signal(signal.SIGKILL)
    await child.aclose()
    name = f"python-docker-mcp-build-{derived_name(settings).rpartition(':')[2]}"
    with anyio.fail_after(30):
        while await engine.run("ps", "--all", "--quiet", f"--filter=name={name}"):
            await anyio.sleep(0.1)
    assert await engine.inspect("image", derived_name(settings), "{{.Id}}") is None
    image = await derive_image(engine, settings, lambda _: None)
    assert image.problem is None


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_a_build_whose_container_is_killed_is_tried_again(settings: Config, engine: Engine) -> None:
    helper = f"python-docker-mcp-build-{derived_name(settings).rpartition(':')[2]}"
    killed: list[str] = []

    def kill_the_first(text: str) -> None:
        if "installing" in text and not killed:
            listed = [engine.command, "ps", f"--filter=name={helper}", "--format={{.Names}}"]
            killed.extend(subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split())
            subprocess.run([engine.command, "kill", *killed], capture_output=True, check=True)

    image = await derive_image(engine, settings, kill_the_first)
    assert len(killed) == 1
    assert image.problem is None


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_without_an_index_code_still_runs_and_is_told_what_is_missing(settings: Config, index: Index) -> None:
    index.files.clear()
    async with open_runner(settings) as runner:
        assert (await runner.execute("6 * 7")).value == "42"
        assert runner.launcher.image is not None
        assert "could not be preinstalled" in (runner.launcher.image.problem or "")
        result = await runner.execute("import alpha")
        assert result.exception is not None
        assert result.exception.missing == "alpha"


@pytest.mark.engine
@pytest.mark.anyio
async def test_with_nothing_preinstalled_the_base_image_is_used_as_it_is(settings: Config) -> None:
    async with open_runner(plain(settings)) as runner:
        await runner.execute("1")
        assert runner.launcher.image is not None
        assert runner.launcher.image.name == sandbox_runner.host_image_name()


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_the_image_moves_in_a_file_to_a_host_without_network(
    settings: Config, engine: Engine, index: Index, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps({
            "docker": {"command": engine.command, "image": "host"},
            "package": dataclasses.asdict(settings.package),
        })
    )  # fmt: skip

    command = [sys.executable, str(ROOT / "python_docker_mcp.py"), "build", f"--config={config}"]
    name = (await anyio.run_process(command)).stdout.decode().strip()
    assert name == derived_name(settings)
    file = str(tmp_path / "image.tar")
    await engine.run("save", "--output", file, name, timeout=60)
    await engine.run("rmi", name)
    index.files.clear()
    await engine.run("load", "--input", file, timeout=60)
    async with open_runner(settings) as runner:
        assert (await runner.execute("import alpha; alpha.__version__")).value == "'1.0'"


# ── certificates and proxies ──


def authority(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for 127.0.0.1, and the file with the authority that signed it."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.now(UTC)

    def certificate(subject: str, issuer: str, key: Any, signer: Any, ca: bool) -> Any:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(signer, hashes.SHA256())

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = certificate("inspecting proxy", "inspecting proxy", root_key, root_key, True)
    leaf = certificate("127.0.0.1", "inspecting proxy", key, root_key, False)
    bundle, chain = folder / "authority.pem", folder / "server.pem"
    bundle.write_bytes(root.public_bytes(serialization.Encoding.PEM))
    chain.write_bytes(
        leaf.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return context, bundle


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
@pytest.mark.parametrize("installer", ["uv", "pip"])
async def test_behind_an_inspecting_proxy_its_authority_is_trusted_when_told(
    settings: Config, installer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, bundle = authority(tmp_path)
    served = Index(context)
    fill(served)
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(variable, raising=False)
    settings = plain(settings, index_url=served.url, installer=installer)
    try:
        async with open_runner(settings) as runner:
            refused = await runner.install("alpha")
            assert not refused.ok
            assert "certificate" in refused.output.lower()
        for way in ("setting", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "trusted host"):
            told = settings
            with monkeypatch.context() as patch:
                if way == "setting":
                    told = plain(settings, ca_bundle=str(bundle))
                elif way == "trusted host":
                    told = plain(settings, trusted_hosts=("127.0.0.1",))
                else:
                    patch.setenv(way, str(bundle))
                told = plain(told, volume=f"{settings.package.volume}-{way.partition(' ')[0].lower()}")
                async with open_runner(told) as runner:
                    installed = await runner.install("alpha")
                    assert installed.ok, (way, installed)
                    assert (await runner.execute("import alpha; alpha.__version__")).value == "'2.0'"
                engine = await find_engine(settings.docker.command)
                remove_volume(engine.command, told.package.volume)
    finally:
        served.close()


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_neither_certificates_nor_proxies_stay_in_the_image_or_reach_the_code(
    settings: Config, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(authority(tmp_path)[1].read_bytes())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,secret.example")
    settings = dataclasses.replace(settings, package=dataclasses.replace(settings.package, ca_bundle=str(bundle)))
    async with open_runner(settings) as runner:
        result = await runner.execute(
            "import os\n"
            "found = [path for folder, _, files in os.walk('/') if not folder.startswith(('/proc', '/sys'))\n"
            "         for path in (os.path.join(folder, file) for file in files) if 'certificates.pem' in path]\n"
            "(found, [value for value in os.environ.values() if 'secret' in value])"
        )
        assert result.value == "([], [])", result
        assert runner.launcher.image is not None
        about = await engine.run("image", "inspect", runner.launcher.image.name)
        assert "secret.example" not in about
        assert "CERTIFICATE" not in about


# ── install-package ──


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
@pytest.mark.parametrize("installer", ["uv", "pip"])
async def test_a_session_sees_what_is_installed_at_once_with_its_variables_kept(
    settings: Config, installer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, session: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    async with open_runner(plain(settings, installer=installer), notebooks=True) as runner:
        await runner.execute("x = 5", session=session)
        installed = await runner.install("alpha>=1,<2", session=session)
        assert installed.ok
        assert installed.installed == (("alpha", "1.0"),)
        result = await runner.execute("import alpha; (x, alpha.__version__)", session=session)
        assert result.value == "(5, '1.0')"
        check = "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError as e: print(e)\n"
        check += "try: open('/packages/x', 'w')\nexcept OSError as e: print(e)"
        assert (await runner.execute(check, session=session)).stdout.splitlines()[1].startswith("[Errno 30] Read-only")
        other = await runner.execute("import alpha", session=f"{session}-other")
        assert other.exception is not None
        assert other.exception.type == "ModuleNotFoundError"
        for name in (session, f"{session}-other"):
            await runner.close_session(name)
    cells = json.loads((tmp_path / f".python-docker-mcp/notebooks/{session}.ipynb").read_text())["cells"]
    assert [cell["source"] for cell in cells][:2] == ["x = 5", "%pip install 'alpha>=1,<2'"], "it can be run again"


LOCK_ALL = """
import fcntl, os, threading, time
held = {}
def lock_all():
    while True:
        for folder, _, names in os.walk('/packages'):
            for path in [folder, *(f'{folder}/{name}' for name in names)]:
                try:
                    if path not in held and len(held) < 900:
                        held[path] = os.open(path, os.O_RDONLY)
                        fcntl.flock(held[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    pass
        time.sleep(0.001)
threading.Thread(target=lock_all, daemon=True).start()
time.sleep(1)
"""


@pytest.mark.engine
@pytest.mark.anyio
@pytest.mark.parametrize("is_defended", [True, False])
async def test_two_servers_install_side_by_side_while_code_locks_all_that_it_can_open(
    settings: Config, engine: Engine, volume: str, is_defended: bool, monkeypatch: pytest.MonkeyPatch, session: str
) -> None:
    mode = "import os; os.makedirs('/packages/.cache', exist_ok=True); os.chmod('/packages/.cache', {})"
    if not is_defended:
        weak = sandbox_runner.INSTALLER_SOURCE.replace("os.chmod(cache, 0o700)", "os.chmod(cache, 0o755)")
        monkeypatch.setattr(sandbox_runner, "INSTALLER_SOURCE", weak)
        monkeypatch.setattr(sandbox_runner, "INSTALL_TIMEOUT", 12)
        await in_volume(engine, volume, mode.format("0o755"))
    outcomes: list[object] = []

    async def install(runner: Runner, package: str) -> None:
        try:
            outcomes.append((await runner.install(package)).ok)
        except sandbox_runner.EngineError as error:
            outcomes.append(str(error))

    async with open_runner(plain(settings)) as one, open_runner(plain(settings)) as other:
        assert (await one.install("loud", session=session)).ok  # so that there is something to lock
        await one.execute(LOCK_ALL, session=session)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(install, one, "alpha")
            tasks.start_soon(install, other, "gamma")
        for runner in (one, other):
            await runner.close_session(session)
    if is_defended:
        assert outcomes == [True, True]
    else:
        assert any("did not end within 12 seconds" in str(outcome) for outcome in outcomes), outcomes
        await in_volume(engine, volume, mode.format("0o700"))


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_extras_and_versions_count_and_sets_build_on_each_other(settings: Config, session: str) -> None:
    async with open_runner(plain(settings)) as runner:
        assert (await runner.install("beta[more]", session=session)).installed == (
            ("alpha", "1.0"), ("beta", "1.0"), ("gamma", "3.1"),
        )  # fmt: skip
        assert (await runner.install("loud", session=session)).installed == (("loud", "1.0"),)
        result = await runner.execute("import alpha, beta, gamma, loud; alpha.__version__", session=session)
        assert result.value == "'1.0'", result
        await runner.close_session(session)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_what_the_image_has_is_not_downloaded_again(settings: Config, index: Index, session: str) -> None:
    async with open_runner(settings) as runner:
        await runner.execute("1")
        before = len(index.downloads())
        again = await runner.install("alpha", session=session)
        assert again.ok
        assert "alpha 1.0 is part of the image already" in again.message
        await runner.install("beta", session=session)
        assert {file for file in index.downloads()[before:] if not file.startswith("uv-")} == {
            "beta-1.0-py3-none-any.whl"
        }
        await runner.close_session(session)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_a_second_session_gets_the_same_without_network(settings: Config, index: Index, session: str) -> None:
    async with open_runner(plain(settings)) as runner:
        assert (await runner.install("alpha", session=f"{session}-one")).ok
        index.close()
        assert (await runner.install("alpha", session=f"{session}-two")).ok
        assert (await runner.execute("import alpha; alpha.__version__", session=f"{session}-two")).value == "'2.0'"
        for name in (f"{session}-one", f"{session}-two"):
            await runner.close_session(name)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_without_a_session_it_holds_for_all_later_executions_and_survives_a_restart(
    settings: Config, session: str
) -> None:
    async with open_runner(plain(settings)) as runner:
        await runner.execute("1", session=f"{session}-old")
        assert (await runner.install("gamma")).ok
        assert (await runner.execute("import gamma; gamma.__version__")).value == "'3.1'"
        assert (await runner.execute("import gamma; gamma.__version__", session=f"{session}-old")).value == "'3.1'"
        await runner.close_session(f"{session}-old")
    async with open_runner(plain(settings)) as runner:
        assert (await runner.execute("import gamma; gamma.__version__")).value == "'3.1'"
        assert (await runner.install("alpha", session=session)).ok
        assert (await runner.execute("import alpha, gamma", session=session)).status == "ok"
        await runner.close_session(session)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_a_session_keeps_its_packages_when_its_worker_or_its_host_is_lost(settings: Config, session: str) -> None:
    async with open_runner(plain(settings)) as runner:
        assert (await runner.install("alpha", session=session)).ok
        for end, state in (("os._exit(1)", "restored"), ("os.fork() or os.kill(-1, 9)\nos.wait()", "lost")):
            assert (await runner.execute(f"import os\n{end}", session=session)).state == state
            assert (await runner.execute("import alpha", session=session)).status == "ok"
    async with open_runner(plain(settings)) as runner:
        assert (await runner.install("gamma", session=session)).ok
        assert (await runner.execute("import gamma; alpha.__version__", session=session)).value == "'2.0'"
        await runner.close_session(session)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_a_new_version_of_what_is_imported_already_says_that_a_fresh_session_is_needed(
    settings: Config, session: str
) -> None:
    async with open_runner(plain(settings)) as runner:
        assert (await runner.install("alpha<2", session=session)).stale == ()
        await runner.execute("import alpha", session=session)
        newer = await runner.install("alpha>=2", session=session)
        assert newer.ok
        assert newer.stale == ("alpha",)
        assert (await runner.execute("alpha.__version__", session=session)).value == "'1.0'"
        await runner.close_session(session)
        await runner.install("alpha>=2", session=session)
        assert (await runner.execute("import alpha; alpha.__version__", session=session)).value == "'2.0'"
        await runner.close_session(session)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_a_failure_tells_why_in_the_installers_words_and_what_was_meant(settings: Config, session: str) -> None:
    async with open_runner(plain(settings)) as runner:
        missing = await runner.install("cv2", session=session)
        assert not missing.ok
        assert "cv2" in missing.output
        assert missing.name == "cv2"
        conflict = await runner.install("alpha>=7")
        assert not conflict.ok
        assert "alpha" in conflict.output
        assert (await runner.execute("1", session=session)).value == "1"
        await runner.close_session(session)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
async def test_sets_that_nobody_used_for_long_are_pruned(settings: Config, engine: Engine, session: str) -> None:
    async with open_runner(plain(settings)) as runner:
        await runner.install("alpha", session=session)
        sets = "glob.glob('/packages/*/????????????????')"
        await in_volume(
            engine, settings.package.volume, f"import glob, os; [os.utime(path, (0, 0)) for path in {sets}]"
        )
        count = f"import glob; print(len({sets}))"
        assert await in_volume(engine, settings.package.volume, count) == "1"
        await runner.install("gamma", session=f"{session}-t")
        assert await in_volume(engine, settings.package.volume, count) == "1"
        for name in (session, f"{session}-t"):
            await runner.close_session(name)


# ── preload and Matplotlib ──


@pytest.mark.engine
@pytest.mark.anyio
async def test_the_version_that_was_installed_is_there_although_another_one_was_imported_beforehand(
    settings: Config, session: str
) -> None:
    look, old, new = "import alpha; alpha.__version__", f"{session}-old", f"{session}-new"
    config = dataclasses.replace(settings, pool=PoolConfig(warm=2, preload=("alpha",)))
    async with open_runner(config, warm=True) as runner, open_runner(config, warm=True) as other:
        for each in (runner, other):
            await until_prepared(each, 2)
            assert (await each.execute(look)).value == "'1.0'"
            await until_prepared(each, 2)
        await runner.execute("x = 1", session=old)
        try:
            assert (await runner.install("alpha==2.0", session=session)).stale == ()
            assert (await runner.execute(look, session=session)).value == "'2.0'"
            assert (await runner.execute(look)).value == "'1.0'"
            assert (await runner.install("alpha==2.0")).ok
            for _ in range(3):
                results = [await each.execute(look) for each in (runner, other)]
                assert [result.value for result in results] == ["'2.0'", "'2.0'"], results
            await until_prepared(runner, 2)
            warm = await runner.execute("import sys; sys.modules['alpha'].__version__")
            assert warm.value == "'2.0'"
            assert (await runner.execute(look, session=new)).value == "'2.0'"
            result = await runner.execute(look, session=old)
            assert (result.value, result.stale) == ("'1.0'", ("alpha",))
        finally:
            for name in (old, new, session):
                await runner.close_session(name)


async def until_prepared(runner: Runner, number: int) -> None:
    """Wait until so many sandboxes are ready, with everything imported."""
    with anyio.fail_after(60):
        while len(runner.pool.ready) < number:
            await anyio.sleep(0.05)
        for sandbox in list(runner.pool.ready):
            await sandbox.prepared.wait()


@pytest.mark.engine
@pytest.mark.anyio
async def test_ready_sandboxes_have_modules_imported_and_missing_ones_are_logged(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    pool = PoolConfig(warm=1, preload=("nosuchmodule", "decimal", "sqlite3"))
    async with open_runner(dataclasses.replace(config, pool=pool), warm=True) as runner:
        with anyio.fail_after(60):
            while not runner.pool.ready:
                await anyio.sleep(0.05)
            await runner.pool.ready[0].prepared.wait()
        assert "preloading nosuchmodule" in caplog.text
        name = runner.pool.ready[0].name
        result = await runner.execute("import sys; [m in sys.modules for m in ('decimal', 'sqlite3', 'nosuchmodule')]")
        assert result.value == "[True, True, False]"
        assert name not in [sandbox.name for sandbox in runner.pool.ready]


@pytest.mark.engine
@pytest.mark.anyio
async def test_the_preinstalled_packages_are_there_and_matplotlib_draws_without_a_word(engine_command: str) -> None:
    config = Config(docker=DockerConfig(command=engine_command, image="host", timeout=120))
    async with open_runner(config) as runner:
        assert runner.launcher.image is None
        result = await runner.execute(
            "import numpy, pandas, scipy, matplotlib, sklearn, sympy\n"
            "import matplotlib.pyplot as plt\n"
            "plt.plot([1, 2, 3]); plt.title('Grüße, Ωμέγα')\n"
            "import glob, os; print(*map(os.path.realpath, glob.glob(os.environ['MPLCONFIGDIR'] + '/fontlist*')))"
        )
        assert result.stdout.startswith("/opt/python-docker-mcp/matplotlib/fontlist"), result.stdout
        assert runner.launcher.image is not None
        assert runner.launcher.image.problem is None
        assert (result.status, result.stderr) == ("ok", "")
        pictures = [item for item in result.output if isinstance(item, sandbox_runner.Rich)]
        assert [list(picture.forms) for picture in pictures] == [["text/plain", "image/png"]]
        result = await runner.execute(
            "import matplotlib.pyplot as plt\nplt.plot([1]); plt.title('Ba$$in')\nplt.figure(); plt.plot([2])\n"
            "open('file', 'w').write('x')\ny = 5\n1 / 0",
            state={},
        )
        note, picture = (item for item in result.output if isinstance(item, sandbox_runner.Rich))
        assert note.forms["text/plain"].startswith("[figure 1 could not be drawn: ValueError: Ba$$in")
        assert "image/png" in picture.forms
        assert (result.status, result.variables, [file.path for file in result.files]) == ("error", {"y": 5}, ["file"])
        assert result.exception
        assert (result.exception.type, result.exception.line) == ("ZeroDivisionError", 6)


# ── system packages ──

NEWEST = "localhost/python-docker-mcp-tests:3.14"  # made by engines.sh, of Debian


@pytest.mark.parametrize("name", ["", "-x", "libc6-", "a b", "a;b", "A", "../a", "a=", "a=1;x"])
def test_what_is_no_system_package_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=r"package\.system: .* is not the name of a Debian, Ubuntu or Alpine package"):
        PackageConfig(system=(name,))


def test_names_of_system_packages() -> None:
    assert PackageConfig(system=("g++", "libgomp1", "libstdc++6", "python3.12", "graphviz=2.42.2-9+b1", "0ad")).system
    with pytest.raises(ValueError, match=r"package\.system_mirror: 'mirror' is not an address"):
        PackageConfig(system_mirror="mirror")


APT = [" update", " install libgomp", " clean"]


@pytest.mark.parametrize(
    ("manager", "source", "line", "expected"),
    [
        ("apk", "repositories", "https://dl-cdn.alpinelinux.org/alpine/v3.20/main", ["add --no-cache"]),
        ("apt-get", "sources.list", "deb http://security.debian.org/debian-security trixie-security main", APT),
        ("apt-get", "ubuntu.sources", "URIs: http://archive.ubuntu.com/ubuntu/", APT),
    ],
)
def test_each_manager_is_asked_in_its_own_way_and_the_mirror_is_not_kept(
    manager: str,
    source: str,
    line: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With what stands for the manager, as no image of Alpine's or Ubuntu's can be had everywhere."""
    file = tmp_path / source
    file.write_text(line)
    ran: list[str] = []

    def run(command: list[str]) -> None:
        """Note the command, and what its sources say."""
        ran.append(" ".join(command))
        folder = re.search(r"(?:SourceList|--repositories-file)=(\S+)/", ran[-1])
        assert folder
        (copy,) = Path(folder[1]).rglob(source)
        assert copy.read_text() == re.sub(r"https?://[^/]*", "https://mirror.example", line)

    monkeypatch.setattr(shutil, "which", lambda program: program == manager)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(glob, "glob", lambda pattern: [str(file)] * ("apt" in pattern and pattern.endswith("/*")))
    monkeypatch.setattr(sandbox_runner, "APK_REPOSITORIES", str(file) if manager == "apk" else "/no/such/file")
    monkeypatch.setattr(sandbox_runner, "run_tool", run)
    sandbox_runner.add_system_packages({"system": ["libgomp"], "system_mirror": "https://mirror.example/"})
    assert [part in line for part, line in zip(expected, ran, strict=True)] == [True] * len(expected)
    assert file.read_text() == line


def test_proxies_are_named_in_small_letters_too_which_apt_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HTTP_PROXY", "http://a"), ("HTTPS_PROXY", "http://b"), ("https_proxy", "http://c")):
        monkeypatch.setenv(name, value)
    environment = sandbox_runner.installer_task(PackageConfig(), {})["environment"]
    assert (environment["http_proxy"], environment["HTTP_PROXY"]) == ("http://a", "http://a")
    assert (environment["https_proxy"], environment["HTTPS_PROXY"]) == ("http://c", "http://b")


LOCALE = """
import locale, os
print([name for name in LOCALES if not os.path.exists(f'/usr/share/i18n/locales/{name}')])
locale.setlocale(locale.LC_ALL, 'de_DE.UTF-8')
locale.format_string('%.1f', 1234.5, grouping=True)
"""


@pytest.mark.engine
@pytest.mark.anyio
async def test_system_packages_are_there(config: Config, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = dataclasses.replace(config.docker, image=NEWEST)
    is_whole = engine.kind == "docker"  # locales know nothing of engines
    system = ("libgomp1", "locales") if is_whole else ("libgomp1",)
    # Each locale takes a second: two are enough, and it is enough that the sources of the others are there.
    two = re.sub(r"(?<=\nLOCALES = )\([^)]*\)", "('tr_TR', 'de_DE')", sandbox_runner.INSTALLER_SOURCE)
    assert two != sandbox_runner.INSTALLER_SOURCE
    monkeypatch.setattr(sandbox_runner, "INSTALLER_SOURCE", two)
    package = dataclasses.replace(config.package, system=system)
    async with open_runner(dataclasses.replace(config, docker=docker, package=package)) as runner:
        assert (await runner.execute("import ctypes; ctypes.CDLL('libgomp.so.1')")).status == "ok"
        if is_whole:
            result = await runner.execute(f"LOCALES = {sandbox_runner.LOCALES}\n{LOCALE}")
            assert (result.value, result.stdout) == ("'1.234,5'", "[]\n")
        image = runner.launcher.image
        assert image is not None
        assert image.problem is None
        assert (await runner.execute("import os; os.path.exists('/var/lib/apt/lists')")).value == "False"
    await remove_image(engine, image.name)


@pytest.mark.engine
@pytest.mark.in_turns
@pytest.mark.anyio
@pytest.mark.parametrize(
    ("name", "image", "said"),
    [
        ("no-such-package", NEWEST, "no-such-package could not be preinstalled: E: Unable to locate package no-such"),
        ("libgomp1", "host", "libgomp1 could not be preinstalled: error: the image has neither apt-get nor apk"),
    ],
)
async def test_system_packages_that_can_not_be_had_are_named(config: Config, name: str, image: str, said: str) -> None:
    docker = dataclasses.replace(config.docker, image=image)
    package = dataclasses.replace(config.package, system=(name,), preinstalled=())  # which would take its time
    async with open_runner(dataclasses.replace(config, docker=docker, package=package)) as runner:
        assert (await runner.execute("6 * 7")).value == "42"
        assert runner.launcher.image is not None
        assert (runner.launcher.image.problem or "").startswith(said)
