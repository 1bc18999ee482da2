#!/bin/sh
# Makes sure that container engines are there and work:
#
#   sh tests/engines.sh demo    one of them: Docker, else Podman; if there is none, installs Docker
#   sh tests/engines.sh test    both, gVisor for Docker, an image with a new Python, npx, nginx and HAProxy; installs what is missing, starts
#                               Docker's daemon if it is down. Without gVisor or that image their tests are skipped
#
# Installing and starting needs root, installing also Debian or Ubuntu. Silent when all is there; when it cannot go on, one
# line on stderr says what to do, and the exit status is 1.
#
# It leaves .engines/env, to be sourced from the project's root by whoever runs Podman: the settings that Podman turned
# out to need on this machine (often none). Remove .engines to have that decided again.
set -u
cd "$(dirname "$0")/.." || exit 1
PATH=$PATH:/usr/sbin:/sbin # where dockerd, runc and iptables live, and not everybody's PATH leads
mkdir -p .engines || exit 1

say() { echo "engines: $*" >&2; }
die() { say "$@"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }
last_line() { line=$(grep . "$1" 2>/dev/null | tail -n 1); echo "${line:-no message}"; }

# within SECONDS COMMAND...: without the limit where there is no timeout, on macOS.
within() {
    seconds=$1; shift
    if has timeout; then timeout "$seconds" "$@"; else "$@"; fi
}

# --- installing

# install WHAT_IS_MISSING PACKAGE...
install() {
    what=$1; shift
    [ "$(id -u)" = 0 ] || die "$what: install and start it (Debian, Ubuntu: apt-get install $*), or run this as root"
    has apt-get || die "$what, and no apt-get here to install it with: install and start it yourself, then run this again"
    say "installing $*"
    # An update that fails is not the end: one broken third-party source is enough for that. The installation decides.
    apt-get -q update </dev/null >.engines/apt.log 2>&1
    # --no-remove: Docker's own packages exclude Debian's; what is on the machine must not be thrown out for a test.
    DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends --no-remove \
        "$@" </dev/null >>.engines/apt.log 2>&1 ||
        die "apt-get install $* failed: $(last_line .engines/apt.log) (more in .engines/apt.log)"
}

# --- Docker

docker_works() {
    has docker || { echo "there is no docker command" >.engines/docker.log; return 1; }
    # With a time limit, because dockerd accepts connections long before it answers them.
    within 10 docker version >.engines/docker.log 2>&1
}

# runs NAME PIDFILE: the process in the pid file is that program, and alive (a zombie has a name, but no executable).
runs() { case $(readlink "/proc/$(cat "$2" 2>/dev/null)/exe") in */"$1"*) ;; *) false ;; esac; }

get_docker() {
    [ -z "${DOCKER_HOST-}" ] || die "Docker at DOCKER_HOST=$DOCKER_HOST does not answer: start it, or unset DOCKER_HOST"
    has dockerd || install "no working Docker ($(last_line .engines/docker.log))" docker.io
    has docker || install "no docker command" docker-cli # a package of its own since Debian 13
    docker_works || start_docker # where systemd rules, installing has started it
}

start_docker() {
    [ "$(id -u)" = 0 ] ||
        die "Docker does not answer ($(last_line .engines/docker.log)): start it, join its group, or run this as root"
    if [ -d /run/systemd/system ]; then # systemd is pid 1; it returns when the daemon is ready
        { systemctl start docker >.engines/docker.log 2>&1 && docker_works; } ||
            die "systemctl start docker did not help ($(last_line .engines/docker.log)): see journalctl -u docker"
        return
    fi
    log=/var/log/dockerd.log
    started=
    deadline=$(($(date +%s) + 60))
    until docker_works; do
        [ "$(date +%s)" -lt "$deadline" ] ||
            die "dockerd did not answer within 60 s ($(last_line .engines/docker.log)), its log $log ends: $(last_line "$log")"
        if runs dockerd /var/run/docker.pid; then
            : # ours or somebody else's: it is starting, or stopping
        elif [ -z "$started" ]; then
            # A killed daemon leaves its pid file, and the next one takes any process with that number for a live daemon.
            rm -f /var/run/docker.pid
            runs containerd /var/run/docker/containerd/containerd.pid || rm -f /var/run/docker/containerd/containerd.pid
            (cd / && exec setsid nohup dockerd >"$log" 2>&1 </dev/null) &
            started=$!
        elif ! kill -0 "$started" 2>/dev/null; then
            die "dockerd does not start, its log $log ends: $(last_line "$log")"
        fi
        sleep 1
    done
}

# --- gVisor, as a runtime of Docker's

docker_has_gvisor() { docker info --format '{{json .Runtimes}}' 2>/dev/null | grep -q '"runsc"'; }

get_gvisor() {
    settings=/etc/docker/daemon.json
    if [ "$(uname)" != Linux ] || [ "$(id -u)" != 0 ] || [ -n "${DOCKER_HOST-}" ]; then
        say "Docker has no runtime runsc, and setting it up takes root on its host: the tests of gVisor will be skipped"
    elif [ -s "$settings" ]; then
        say "$settings has settings already and is left alone: the tests of gVisor are skipped unless you add runsc to it"
    elif ! has runsc && ! (install "no gVisor" runsc); then # in a shell of its own: to die there is not the end
        say "the tests of gVisor will be skipped"
    else
        mkdir -p /etc/docker
        # ptrace works everywhere, also in virtual machines; sandboxes have no network anyway.
        printf '{"runtimes": {"runsc": {"path": "%s", "runtimeArgs": ["--platform=ptrace", "--network=none"]}}}\n' \
            "$(command -v runsc)" >"$settings"
        kill -HUP "$(cat /var/run/docker.pid)" # has the daemon read that, and disturbs no container
        tries=0
        until docker_has_gvisor; do
            tries=$((tries + 1))
            [ "$tries" -le 10 ] || { say "Docker did not take the runtime runsc from $settings"; return; }
            sleep 1
        done
    fi
}

# --- Podman

# Runs a container for real. No registry need be reachable: the image is this machine's `true` and the libraries it needs.
podman_runs() {
    if [ "$(uname)" != Linux ]; then # there Podman has a virtual machine, which is what it needs
        podman info >.engines/podman.log 2>&1
        return
    fi
    image=localhost/engines-probe:$$
    # shellcheck disable=SC2046 # one word for each library
    tar -chf - /bin/true $(ldd /bin/true | grep -o '/[^ ]*') 2>/dev/null |
        podman import -q - "$image" >/dev/null 2>.engines/podman.log &&
        within 60 podman run --rm "$image" /bin/true 2>.engines/podman.log
    status=$?
    podman rmi -f "$image" >/dev/null 2>&1
    return $status
}

# Tries the machine's own settings first, then ours, and keeps the answer.
podman_works() {
    has podman || return
    [ ! -f .engines/env ] || return 0
    if podman_runs; then
        settings=
    elif (export CONTAINERS_CONF="$PWD/tests/containers.conf" && podman_runs); then
        # shellcheck disable=SC2016 # the project may move: it is expanded where it is sourced
        settings='export CONTAINERS_CONF="$PWD/tests/containers.conf"'
    else
        return 1
    fi
    echo "$settings" >.engines/env.$$ && mv .engines/env.$$ .engines/env
}

# --- an image with a Python that is newer than most hosts'

get_newest_python() {
    name=localhost/python-docker-mcp-tests:3.14
    if ! docker image inspect "$name" >/dev/null 2>&1; then
        if within 120 docker pull -q python:3.14-slim >.engines/python.log 2>&1; then
            docker tag python:3.14-slim "$name"
        elif has mmdebstrap || (install "no image with Python 3.14" mmdebstrap); then
            within 180 mmdebstrap --aptopt='Acquire::Check-Valid-Until "false"' --variant=minbase --include=python3 sid - \
                2>.engines/python.log | docker import - "$name" >/dev/null 2>&1
        fi
    fi
    docker image inspect "$name" >/dev/null 2>&1 ||
        { say "no image with Python 3.14 ($(last_line .engines/python.log)): its tests will be skipped"; return; }
    podman image exists "$name" || docker save "$name" | podman load -q >/dev/null
}

# ---

case ${1-} in
demo)
    docker_works || podman_works || get_docker
    ;;
test)
    docker_works || get_docker
    ! grep -q 'Podman Engine' .engines/docker.log ||
        die "docker is Podman in disguise here: for the tests remove podman-docker and install Docker"
    docker_has_gvisor || get_gvisor
    has podman || install "no podman" podman runc
    podman_works || { ! has runc && install "no working Podman" runc && podman_works; } ||
        die "podman cannot run a container, with its own settings nor with tests/containers.conf: $(last_line .engines/podman.log)"
    get_newest_python
    has npx || install "no npx, which runs the MCP Inspector for one of the tests" npm
    has nginx || install "no nginx, behind which one of the tests puts servers" nginx-light
    has haproxy || install "no HAProxy, behind which one of the tests puts servers" haproxy
    ;;
*) die "usage: sh tests/engines.sh demo|test" ;;
esac
