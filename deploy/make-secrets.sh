#!/bin/sh
# Make the secrets that docker-compose.yml names: sh deploy/make-secrets.sh [FOLDER]. What is there already stays.
#
# The folder is open to its owner only. The files in it are readable, since the containers' users, who are not its owner,
# see them through mounts of their own.
set -eu
folder=${1:-"$(dirname "$0")/secrets"}
mkdir -p "$folder"
chmod 700 "$folder"

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

# make NAME: standard input becomes the secret, if there is none yet.
make() {
    if [ ! -e "$folder/$1" ]; then
        cat > "$folder/$1.new"
        chmod 444 "$folder/$1.new"
        mv "$folder/$1.new" "$folder/$1"
        echo "made $folder/$1"
    fi
}

random | make tenant-secret
random | make valkey-password
random | make metrics-key
random | make grafana-password
printf 'default %s\nprometheus %s\n' "$(random)" "$(cat "$folder/metrics-key")" | make api-keys

# The least that stemcache needs, on its own keys only. Valkey is told the password's hash.
hash=$(sha256sum < "$folder/valkey-password" | cut -d ' ' -f 1)
allowed='-@all +get +getex +set +exists +unlink +touch +expire +ping +scan +strlen +config|get'
printf 'user default reset on nopass -@all +ping\nuser stemcache reset on #%s ~stemcache:* %s\n' "$hash" "$allowed" |
    make valkey-users

echo "Your API key: $(sed -n 's/^default //p' "$folder/api-keys")"
echo "Grafana's password, for the user admin: $(cat "$folder/grafana-password")"
