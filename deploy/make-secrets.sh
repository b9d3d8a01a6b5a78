#!/bin/sh
# Make the secrets that docker-compose.yml and deploy/kubernetes read as files; keeps those that are there.
#   sh deploy/make-secrets.sh [DIRECTORY]     by default secrets/
# PUBLIC_HOST is the name in the self-signed certificate, POSTGRES_ADDRESS where the database is.
set -eu
umask 077
directory=${1:-secrets}
host=${PUBLIC_HOST:-localhost}
database=${POSTGRES_ADDRESS:-postgres:5432}

mkdir -p "$directory"
# The directory is the owner's alone. The files are bind-mounted one by one, as they are, into containers whose user
# is another: those must be able to read them.
chmod 700 "$directory"

keep() { # keep NAME: store what comes, unless there is such a file
	if [ -s "$directory/$1" ]; then
		cat >/dev/null
	else
		cat >"$directory/$1.new"
		chmod 444 "$directory/$1.new"
		mv "$directory/$1.new" "$directory/$1"
	fi
}

for name in secret_key key_pepper session_keys; do
	openssl rand -hex 32 | keep "$name"
done
openssl rand -hex 24 | keep postgres_password
printf 'postgres://proxysite:%s@%s/proxysite\n' "$(cat "$directory/postgres_password")" "$database" | keep database_url

if [ ! -s "$directory/tls_certificate" ]; then
	case $host in
	*[!0-9.]*) name=DNS:$host ;;
	*) name=IP:$host ;;
	esac
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj "/CN=$host" \
		-addext "subjectAltName=$name,DNS:localhost,IP:127.0.0.1" \
		-keyout "$directory/tls_key.made" -out "$directory/tls_certificate.made" 2>/dev/null
	keep tls_key <"$directory/tls_key.made"
	keep tls_certificate <"$directory/tls_certificate.made"
	rm -f "$directory/tls_key.made" "$directory/tls_certificate.made"
	echo "$directory/tls_certificate is self-signed, for $host: put your own in its place, and its key in tls_key."
fi
