#!/bin/sh
# Install inferd on this box as a systemd service, or upgrade or remove it. Run it as root, from a checkout; twice is fine.
set -eu

usage() {
    cat <<'USAGE'
usage: install.sh [--extra NAME] [--offline FOLDER] [--python PROGRAM] [--no-start]
       install.sh --uninstall [--purge]

  --extra NAME      also install an optional part of inferd, for example torch
  --offline FOLDER  take every wheel, inferd's own included, from FOLDER and use no network. Fill it on another machine:
                    python3 -m pip wheel --wheel-dir FOLDER --constraint constraints.txt .
  --python PROGRAM  Python 3.11 or newer to run inferd with (default: python3)
  --no-start        install and enable, but start nothing now
  --uninstall       stop and remove what this script installed; configuration, trust anchor and models stay
  --purge           with --uninstall: remove those, too, and the user inferd
USAGE
}

source_dir=$(dirname "$(dirname "$(readlink -f "$0")")")
code=/usr/lib/inferd config=/etc/inferd share=/usr/share/inferd state=/var/lib/inferd doc=/usr/share/doc/inferd
units=/etc/systemd/system command_link=/usr/local/bin/inferctl
unit_files="inferd.service inferd.socket inferd-http.socket inferd-tcp.socket"
extra='' wheels='' python=python3 start=yes action=install purge=no new=''

say() { printf 'install.sh: %s\n' "$*"; }
fail() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }
systemd_runs() { [ -d /run/systemd/system ]; }

while [ $# -gt 0 ]; do
    case $1 in
        --extra) [ $# -ge 2 ] || fail "--extra needs a name"; extra=$2; shift ;;
        --offline) [ $# -ge 2 ] || fail "--offline needs a folder"; wheels=$2; shift ;;
        --python) [ $# -ge 2 ] || fail "--python needs a program"; python=$2; shift ;;
        --no-start) start=no ;;
        --uninstall) action=uninstall ;;
        --purge) purge=yes ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "unknown option $1" ;;
    esac
    shift
done

check() {
    [ "$(id -u)" = 0 ] || fail "must run as root: sudo $0"
    command -v systemctl >/dev/null || fail "systemctl is missing: inferd's service needs systemd"
    [ "$action" = install ] || return 0
    [ "$purge" = no ] || fail "--purge goes with --uninstall"
    command -v "$python" >/dev/null || fail "$python is missing: apt-get install python3 python3-venv"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" -V 2>&1) is too old: 3.11 or newer is needed (--python PROGRAM)"
    "$python" -c 'import ensurepip' 2>/dev/null || fail "Python's venv is missing: apt-get install python3-venv"
    if [ -n "$wheels" ]; then
        wheels=$(readlink -f "$wheels")
        set -- "$wheels"/inferd-*.whl
        [ $# = 1 ] && [ -f "$1" ] || fail "$wheels must hold exactly one inferd-*.whl; see --help for how to fill it"
        own_wheel=$1
    fi
}

# A finished environment takes the place of the old one at once; until then the running daemon keeps its own.
install_code() {
    mkdir -p "$code"
    chmod 0755 "$code"
    new=$code/venv-$(date +%Y%m%d%H%M%S)-$$
    trap 'rm -rf "$new"' EXIT
    say "installing inferd${extra:+[$extra]} into $new"
    "$python" -m venv "$new"
    if [ -n "$wheels" ]; then
        pip_install --no-index --find-links "$wheels" "$own_wheel${extra:+[$extra]}"
    else
        pip_install "$source_dir${extra:+[$extra]}"
    fi
    "$new/bin/inferd" --version >/dev/null || fail "the installed inferd does not start; the old one stays"
    chmod -R go=rX "$new"  # workers and the service's user only read it
    ln -sfn "$(basename "$new")" "$code/venv.next"
    mv -T "$code/venv.next" "$code/venv"
    trap - EXIT
}

pip_install() {
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        --constraint "$source_dir/constraints.txt" "$@" ||
        fail "pip failed; nothing was changed. Without network use --offline FOLDER"
}

install_files() {
    install -D -m 0644 "$source_dir/systemd/inferd.sysusers" /usr/lib/sysusers.d/inferd.conf
    install -D -m 0644 "$source_dir/systemd/inferd.tmpfiles" /usr/lib/tmpfiles.d/inferd.conf
    systemd-sysusers inferd.conf
    systemd-tmpfiles --create inferd.conf
    install -d -m 0755 "$share" "$share/anchor" "$doc"
    install -d -m 0700 -o inferd -g inferd "$state"
    install -m 0644 "$source_dir/docs/operate.md" "$source_dir/docs/config.md" "$doc/"
    for unit in $unit_files; do
        install -m 0644 "$source_dir/systemd/$unit" "$units/$unit"
    done
    install -D -m 0644 "$source_dir/systemd/inferd.service.d/gpu.conf.example" "$units/inferd.service.d/gpu.conf.example"
    if [ -e "$config/inferd.toml" ]; then
        say "keeping $config/inferd.toml"
    else
        install -m 0644 "$source_dir/systemd/inferd.toml.example" "$config/inferd.toml"
    fi
    mkdir -p "$(dirname "$command_link")"
    if [ -L "$command_link" ] || [ ! -e "$command_link" ]; then
        ln -sfn "$code/venv/bin/inferctl" "$command_link"
    else
        say "$command_link exists and is not ours: call $code/venv/bin/inferctl"
    fi
}

enable_units() {
    # shellcheck disable=SC2086  # a list of names
    systemctl enable --quiet $unit_files
    if ! systemd_runs || [ "$start" = no ]; then
        say "enabled; it starts with the next boot, or now: systemctl start inferd.socket inferd-http.socket inferd-tcp.socket inferd"
        return 0
    fi
    systemctl daemon-reload
    # The sockets stay open over an upgrade: connections wait in them while the daemon restarts.
    for unit in $unit_files; do
        [ "$unit" = inferd.service ] || systemctl start "$unit" || fail "$unit cannot start: systemctl status $unit"
    done
    if ! systemctl restart inferd.service; then
        say "inferd does not start; the reason:" >&2
        journalctl -u inferd -n 5 -o cat --no-pager >&2 || true
        fail "mend it and run: systemctl restart inferd"
    fi
    say "$(systemctl show -P StatusText inferd.service) ($(systemctl is-active inferd.service))"
}

forget_old_code() {
    for folder in "$code"/venv-*; do
        [ "$folder" -ef "$code/venv" ] || rm -rf "$folder"
    done
}

next_steps() {
    [ -e "$share/anchor/root.json" ] ||
        say "next: copy the store's root.json (from inferhub init --anchor) to $share/anchor/root.json"
    grep -q '^\[\[models\]\]' "$config/inferd.toml" ||
        say "next: name the store and the models in $config/inferd.toml, then: systemctl restart inferd"
    say "then: inferctl status; applications' users join the group inferd: usermod -a -G inferd USER"
}

uninstall() {
    if systemd_runs; then
        # shellcheck disable=SC2086
        systemctl disable --quiet --now $unit_files 2>/dev/null || true
    else
        # shellcheck disable=SC2086
        systemctl disable --quiet $unit_files 2>/dev/null || true
    fi
    for unit in $unit_files; do rm -f "$units/$unit"; done
    rm -f "$units/inferd.service.d/gpu.conf.example"
    [ "$purge" = no ] || rm -rf "$units/inferd.service.d"
    [ ! -d "$units/inferd.service.d" ] || rmdir "$units/inferd.service.d" 2>/dev/null || say "keeping your drop-ins in $units/inferd.service.d"
    rm -f /usr/lib/sysusers.d/inferd.conf /usr/lib/tmpfiles.d/inferd.conf
    rm -rf "$code" "$doc" /run/inferd
    [ "$(readlink "$command_link" 2>/dev/null)" != "$code/venv/bin/inferctl" ] || rm -f "$command_link"
    if systemd_runs; then
        systemctl daemon-reload
        # shellcheck disable=SC2086
        systemctl reset-failed $unit_files 2>/dev/null || true
    fi
    if [ "$purge" = yes ]; then
        rm -rf "$config" "$share" "$state"
        ! id inferd >/dev/null 2>&1 || userdel inferd
        say "removed, with configuration, trust anchor, models and the user inferd"
    else
        say "removed; $config, $share and $state stay (--uninstall --purge removes them, too)"
    fi
}

check
if [ "$action" = uninstall ]; then
    uninstall
    exit 0
fi
install_code
install_files
enable_units
forget_old_code
next_steps
