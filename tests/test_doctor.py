"""Every line of the doctor, made to fail by a fault made for it."""

import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from imatch.cli import doctor
from imatch.core import settings

ROOT = Path(__file__).parents[1]
HEALTHY = """<?xml version="1.0" ?>
<nvidia_smi_log>
  <driver_version>580.65.06</driver_version>
  <cuda_version>13.0</cuda_version>
  <gpu id="00000000:01:00.0">
    <product_name>NVIDIA RTX 4090</product_name>
    <fb_memory_usage><total>24564 MiB</total><free>23000 MiB</free></fb_memory_usage>
  </gpu>
</nvidia_smi_log>"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi on the PATH that prints a text and exits with a code."""

    def put(text=HEALTHY, code=0):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / "told").write_text(text)
        command = tmp_path / "bin" / "nvidia-smi"
        command.write_text(f'#!/bin/sh\ncat "{tmp_path}/bin/told"\nexit {code}\n')
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    return put


@pytest.fixture
def mount():
    """Mounts a tmpfs, which is read only or small: permission bits do not stop root, mounts do."""
    made = []

    def at(folder, options):
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "imatch-test", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip() if done else 'no mount'}")
        made.append(folder)
        return folder

    yield at
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


def fault(check):
    """What a check says to do."""
    state, said = doctor.examine(check)
    assert state == "FIX", said
    return said


def absent(check):
    state, said = doctor.examine(check)
    assert state == "--", said
    return said


def table(*options, cwd=ROOT, **variables):
    """The command's exit code, the states by subject, and all that it printed."""
    line = [sys.executable, "-m", "imatch", "doctor", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    states = {m[2].strip(): m[1] for m in re.finditer(r"^(OK|--|FIX) +(.{12}) ", done.stdout, re.M)}
    return done.returncode, states, done.stdout + done.stderr


# --- the GPU ----------------------------------------------------------------------------------------------


def test_a_healthy_driver(nvidia_smi):
    nvidia_smi()
    assert doctor.driver() == "580.65.06, NVIDIA RTX 4090"
    assert doctor.gpu_memory() == "22.5 GB free"


def test_no_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install NVIDIA's driver" in fault(doctor.driver)
    assert "the line of the driver" in fault(doctor.gpu_memory)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch", 18, "version mismatch; restart the machine"),
        ("", 9, "exit code 9; restart"),
        ("no XML", 0, "prints no XML"),
        ("<nvidia_smi_log><driver_version>580</driver_version></nvidia_smi_log>", 0, "the driver sees no GPU"),
    ],
)
def test_a_broken_driver(nvidia_smi, text, code, said):
    nvidia_smi(text, code)
    assert said in fault(doctor.driver)


def test_a_driver_that_is_older_than_torchs_cuda(nvidia_smi):
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        assert "built without CUDA" in fault(doctor.cuda)
        return
    nvidia_smi()
    assert doctor.cuda().endswith("the driver has 13.0")
    nvidia_smi(HEALTHY.replace("13.0", "11.8"))
    assert "the driver has 11.8: update the driver" in fault(doctor.cuda)
    nvidia_smi(HEALTHY.replace("13.0", ""))
    assert "the driver has none" in fault(doctor.cuda)


def test_torch_without_cuda(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "build the image with FAISS=gpu" in fault(doctor.cuda)


def test_torch_that_sees_no_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "everything runs on the CPU" in fault(doctor.torch_gpu)


def test_torch_that_cannot_compute_on_the_gpu_it_sees(monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine's GPU computes")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # torch itself then finds no driver
    assert "cannot compute on it" in fault(doctor.torch_gpu)


def test_faiss_that_sees_no_gpu():
    import faiss

    if faiss.get_num_gpus():
        pytest.skip("this machine has a GPU")
    assert "FAISS sees no GPU" in fault(doctor.faiss_gpu)


def test_a_gpu_that_is_full_or_does_not_tell(nvidia_smi):
    nvidia_smi(HEALTHY.replace("23000 MiB", "300 MiB"))
    assert "0.3 GB free, 2 wanted: close what else uses the GPU" in fault(doctor.gpu_memory)
    nvidia_smi(HEALTHY.replace("23000 MiB", "N/A"))
    assert "share the machine's memory" in absent(doctor.gpu_memory)


def test_a_library_that_cannot_be_loaded(tmp_path):
    (tmp_path / "faiss.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')")
    code, states, said = table("--cpu", cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert "ImportError: libcublas.so.12" in said
    assert (code, states["FAISS"], states["project"], states["torch"]) == (1, "FIX", "FIX", "OK")
    assert "to fix: FAISS, project" in said


# --- memory, folders, disk --------------------------------------------------------------------------------


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(doctor, "ENOUGH", 1e6)
    assert "1000000 wanted: close other programs" in fault(doctor.memory)


def test_no_notebooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "set PROJECT_HOST" in fault(doctor.project)


def test_a_project_that_cannot_be_written_to(tmp_path, monkeypatch, mount):
    mount(tmp_path / "notebooks", "size=1m")
    (tmp_path / "notebooks" / "01_embed.ipynb").touch()
    monkeypatch.chdir(tmp_path)
    assert doctor.project() == str(tmp_path)
    subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "notebooks")], check=True)
    assert "notebooks cannot be saved" in fault(doctor.project)


@pytest.mark.parametrize("subject", ["data sets", "references", "DINOv3 code"])
def test_a_folder_that_is_absent_empty_or_closed(subject, tmp_path, monkeypatch):
    check = dict(doctor.ALWAYS)[subject]
    variable, host, needed_for = check.args
    monkeypatch.setenv(variable, str(tmp_path / "folder"))
    assert f"needed for {needed_for}; set {host} in docker/.env" in absent(check)
    (tmp_path / "folder").mkdir()
    assert "is empty" in absent(check)
    (tmp_path / "folder" / "a").touch()
    assert check() == f"{tmp_path / 'folder'}, 1 inside"
    monkeypatch.setenv(variable, str(tmp_path / "folder" / "a"))  # a file, which cannot be listed
    assert "cannot be read (Not a directory)" in fault(check)


def test_a_folder_of_somebody_else(tmp_path):
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("not root, or no setpriv: nobody else to be")
    (tmp_path / "closed" / "inside").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    code = "from imatch.cli import doctor; print(doctor.examine(dict(doctor.ALWAYS)['data sets']))"
    other = ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-c", code]
    tmp_path.chmod(0o755)
    for above in tmp_path.parents[:2]:
        above.chmod(0o755)
    for folder in ("closed", "closed/inside"):  # which cannot be listed; which cannot even be looked at
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DATASET_ROOT": str(tmp_path / folder), "HOME": "/"}
        done = subprocess.run(other, env=environment, cwd="/", capture_output=True, text=True, check=False)
        if "Permission denied" in done.stderr and "imatch" not in done.stdout:
            pytest.skip("somebody else cannot run this Python")
        assert "('FIX', " in done.stdout, done.stderr
        assert "cannot be read (Permission denied)" in done.stdout


def test_exports_that_cannot_be_written_to(tmp_path, monkeypatch, mount):
    monkeypatch.setenv("EXPORT_ROOT", str(mount(tmp_path / "exports", "ro")))
    assert "cannot be written to (Read-only file system): set EXPORT_HOST" in fault(doctor.exports)
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path / "not there yet"))
    assert doctor.exports() == str(tmp_path / "not there yet")
    assert not (tmp_path / "not there yet").exists()


def test_a_full_disk(tmp_path, monkeypatch, mount):
    monkeypatch.setenv("EXPORT_ROOT", str(mount(tmp_path / "exports", "size=1m") / "run"))
    assert "0.0 GB free at" in fault(doctor.disk)


# --- weights ----------------------------------------------------------------------------------------------


def test_weights_found_missing_renamed_and_wrong(weights, tmp_path, monkeypatch):
    data_key = str(weights / "data_key.json")
    assert doctor.weights(data_key) == f"vits16, cxTiny in {weights}, each as its name says"
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path / "weights"))
    assert "none of the 12" in absent(lambda: doctor.weights(data_key))
    (tmp_path / "weights").mkdir()
    assert "needed for DINOv3 (sift needs none)" in absent(lambda: doctor.weights(data_key))
    (file,) = weights.glob("dinov3_vits16_*.pth")
    shutil.copy(file, tmp_path / "weights" / f"{file.stem} (1).pth")
    assert "rename it back" in fault(lambda: doctor.weights(data_key))
    (tmp_path / "weights" / f"{file.stem} (1).pth").rename(tmp_path / "weights" / file.name)
    assert doctor.weights(data_key).startswith("vits16 in ")
    (other,) = weights.glob("dinov3_convnext_*.pth")
    shutil.copy(other, tmp_path / "weights" / file.name)
    assert "is not the file that its name says" in fault(lambda: doctor.weights(data_key))
    (tmp_path / "weights" / file.name).write_bytes(file.read_bytes()[:10_000])
    assert "is truncated" in fault(lambda: doctor.weights(data_key))


def test_a_registry_that_is_not_there(tmp_path):
    assert "no file" in fault(lambda: doctor.weights(str(tmp_path / "none.json")))


# --- JupyterLab -------------------------------------------------------------------------------------------


def test_a_port_that_another_program_has(monkeypatch):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever).start()
        monkeypatch.setenv("JUPYTER_PORT", str(other.server_port))
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        try:
            assert f"{other.server_port} is taken by another program: set JUPYTER_PORT" in fault(doctor.port)
            Other.do_GET = lambda self: self.wfile.write(b'HTTP/1.0 200 OK\r\n\r\n{"version": "2.21.1"}')
            assert doctor.port() == f"{other.server_port}: JupyterLab answers"
        finally:
            other.shutdown()
    assert doctor.port() == f"{other.server_port} is free"
    with socket.create_server(("127.0.0.1", other.server_port)) as silent:  # which speaks no HTTP
        threading.Thread(target=lambda: silent.accept()[0].close()).start()
        assert "is taken by another program" in fault(doctor.port)


def test_a_port_that_is_none(monkeypatch):
    monkeypatch.setenv("JUPYTER_PORT", "eight")
    assert "JUPYTER_PORT is 'eight'" in fault(doctor.port)


def test_variables_of_older_containers(monkeypatch):
    for name in settings.REPLACED:
        monkeypatch.delenv(name, raising=False)
    assert doctor.variables() == "none of older containers"
    monkeypatch.setenv("IMG_ROOT", "/photographs")
    monkeypatch.setenv("VIS_DPI", "300")
    said = fault(doctor.variables)
    assert "IMG_ROOT is not read any more: use DATASET_ROOT" in said
    assert "VIS_DPI is not read any more: use parameters" in said


# --- the command ------------------------------------------------------------------------------------------


def test_every_line_of_the_command_has_a_test_here():
    """Each check of the doctor's table is made to fail above."""
    tested = Path(__file__).read_text()
    for subject, check in (*doctor.GPU, *doctor.ALWAYS):
        assert f"doctor.{getattr(check, '__name__', '')}" in tested or f'"{subject}"' in tested, subject


def test_the_command_is_ready_without_a_gpu_and_says_so_with_one(weights, tmp_path):
    code, states, said = table("--cpu", "--data-key", str(weights / "data_key.json"))
    assert code == 0, said
    assert said.endswith("ready\n")
    assert {"torch", "FAISS", "memory", "exports", "weights"} <= set(states)
    assert states["weights"] == "OK"
    code, states, said = table(PATH=str(tmp_path))
    assert (code, states["driver"], states["torch"]) == (3, "FIX", "FIX")
    assert "to fix: driver, CUDA, torch, FAISS, GPU memory" in said
