#!/usr/bin/env bash
# The tests of the runtime and of the number formats on 64-bit Arm, by qemu:
#   tests/processors/aarch64.sh [OPTIONS AND PATHS OF PYTEST]
#
# Needs Debian with qemu-user-static, python3 with pip, and no root. build/aarch64 gets Debian's Python for Arm and the
# wheels for Arm that the extra "light" names; build/aarch64/bin/python runs anything else there.
# QEMU_CPU chooses the processor. Without, it is like a Neoverse V1: udot, ummla, SVE of 256 bits. cortex-a76 has udot,
# cortex-a72 neither.
set -euo pipefail
cd "$(dirname "$0")/../.."
place=$PWD/build/aarch64
root=$place/root

# Debian's own tools fetch and unpack; the machine's packages are neither asked nor changed.
fetch_python() {
  local apt=$place/apt options
  mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$root"
  : > "$apt/status"
  options=(-qq -y -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=false
    -o "Dir::State=$apt" -o "Dir::State::status=$apt/status" -o "Dir::Cache=$apt" -o Debug::NoLocking=1)
  [ "$(id -u)" != 0 ] || options+=(-o APT::Sandbox::User=root)
  apt-get "${options[@]}" update
  apt-get "${options[@]}" --download-only install python3 libstdc++6
  for package in "$apt"/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
  rm -r "$apt"
}

# qemu's own "max" has SVE of 2048 bits and SME, as no machine has. OpenBLAS multiplies wrongly there: NaN from x @ x.T.
export QEMU_CPU=${QEMU_CPU:-max,sme=off,sve-max-vq=2}

# qemu passes this machine's /proc/cpuinfo on. ONNX Runtime takes a processor's dot products from its part's number, and
# ends where none is given.
describe_processor() {
  local part features="fp asimd"
  case $QEMU_CPU in
    max,*) part=0xd40 features="fp asimd asimddp i8mm" ;; # as a Neoverse V1
    cortex-a76) part=0xd0b features="fp asimd asimddp" ;;
    cortex-a72) part=0xd08 ;;
    *) echo "QEMU_CPU=$QEMU_CPU: expected max,OPTION…, cortex-a76 or cortex-a72" >&2; exit 1 ;;
  esac
  mkdir -p "$root/proc"
  printf 'processor\t: 0\nFeatures\t: %s\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: %s\nCPU revision\t: 1\n\n' \
    "$features" "$part" > "$root/proc/cpuinfo"
}

# An environment whose Python is a script: the kernel runs it for child processes too, without binfmt_misc.
make_environment() {
  local python
  python=$(basename "$(ls "$root"/usr/bin/python3.[0-9][0-9])")
  mkdir -p "$place/bin" "$place/lib/$python/site-packages"
  printf 'home = /usr/bin\ninclude-system-site-packages = false\n' > "$place/pyvenv.cfg"
  # Compiled modules are kept here: their own folders may be this machine's.
  printf '#!/bin/sh\nexec qemu-aarch64-static -L %q -0 "$0" %q -X pycache_prefix=%q "$@"\n' \
    "$root" "$root/usr/bin/$python" "$place/pycache" > "$place/bin/python"
  chmod +x "$place/bin/python"
}

# What `pip install ".[light]"` would bring on Arm.
install_packages() {
  local site version
  site=$(echo "$place"/lib/python3.*/site-packages)
  version=$(basename "$(dirname "$site")")
  python3 - > "$place/wanted.txt" <<'PYTHON'
import re, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]

def of(requirements):
    for requirement in requirements:
        own = re.fullmatch(r"embedge\[(.*)\]", requirement)
        yield from (r for extra in own[1].split(",") for r in of(project["optional-dependencies"][extra])) if own else [requirement]

print(*dict.fromkeys(of([*project["dependencies"], "embedge[light]"])), sep="\n")
PYTHON
  cmp -s "$place/wanted.txt" "$place/requirements.txt" ||
    python3 -m pip install --quiet --target "$site" --upgrade --python-version "${version#python}" --implementation cp \
      --only-binary :all: --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
      --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 --requirement "$place/wanted.txt"
  mv "$place/wanted.txt" "$place/requirements.txt"
  CC=false python3 -m pip install --quiet --target "$site" --upgrade --no-deps .
}

command -v qemu-aarch64-static > /dev/null || { echo "apt-get install qemu-user-static" >&2; exit 1; }
[ -d "$root/usr" ] || fetch_python
describe_processor
make_environment
install_packages
paths=(tests/runtime tests/quant)
for argument; do if [ -e "${argument%%::*}" ]; then paths=(); fi; done
EMBEDGE_LIGHT_TESTS=1 exec "$place/bin/python" -m pytest -p no:cacheprovider "${paths[@]}" "$@"
