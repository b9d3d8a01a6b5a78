"""The ledger: keys and what they were granted, one record per request, and sums by the day."""

from __future__ import annotations

from collections.abc import Collection
from decimal import Decimal
from typing import Any, NoReturn

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.db.models import F, Q
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from billing import limits
from billing.fields import EventIdField, UsdField, plain_usd
from billing.indexes import TimeIndex

MODEL_MAX_CHARS = 128
ENDPOINT_MAX_CHARS = 96


class AppendOnlyError(TypeError):
    """Somebody tried to change or remove what has been recorded."""


class Pricing(models.TextChoices):
    PRICED = "priced", _("priced")
    UNPRICED = "unpriced", _("unpriced")
    FREE = "free", _("nothing to charge")


class PriceSource(models.TextChoices):
    """Whose price a record was rated by: a ModelPrice row's, its id in `price_version`, or the shipped list's."""

    OWN = "own", _("own")
    REFRESHED = "refreshed", _("refreshed list")
    LIST = "list", _("list")


_AS_SET = _("Empty: as the settings say. 0: no limit.")


def _limit(label: Any, *, ceiling: int) -> Any:
    return models.BigIntegerField(
        label,
        null=True,
        blank=True,
        validators=[MinValueValidator(0), MaxValueValidator(ceiling)],
        help_text=_AS_SET,
    )


class ApiKey(models.Model):
    """A key that the upstream has accepted, or that an operator has entered; the key itself is not here."""

    fingerprint = models.CharField(
        _("fingerprint"), max_length=64, unique=True, validators=[RegexValidator(r"^[0-9a-f]{64}\Z")], editable=False
    )
    hint = models.CharField(_("hint"), max_length=16, editable=False)
    label = models.CharField(_("label"), max_length=100, blank=True)
    owner = models.CharField(_("owner"), max_length=200, blank=True, help_text=_("E-mail address or note."))
    blocked = models.BooleanField(_("blocked"), default=False, editable=False)
    blocked_at = models.DateTimeField(_("blocked at"), null=True, editable=False)
    price_factor = models.DecimalField(
        _("price factor"),
        max_digits=9,
        decimal_places=4,
        default=Decimal(1),
        validators=[MinValueValidator(0)],
        help_text=_("Every cost of this key is multiplied by it: 0.9 is a discount of 10%."),
    )
    registered = models.BooleanField(
        _("registered"),
        default=False,
        help_text=_("With GATEWAY_MODE=known only registered keys pass. A key that an operator has entered is."),
    )
    requests_per_minute = _limit(_("requests per minute"), ceiling=1_000_000)
    tokens_per_minute = _limit(_("tokens per minute"), ceiling=10**10)
    concurrent_streams = _limit(_("requests at once"), ceiling=1_000_000)
    monthly_usd = UsdField(  # type: ignore[misc]  # None is the setting's
        _("USD a month"), null=True, blank=True, validators=[MinValueValidator(0)], help_text=_AS_SET
    )
    allowed_models = models.TextField(
        _("allowed models"),
        blank=True,
        validators=[limits.check_models],
        help_text=_("Names, or beginnings that end in *, one in a line. Empty: as the settings say; * is all."),
    )
    allowed_networks = models.TextField(
        _("allowed networks"),
        blank=True,
        validators=[limits.check_networks],
        help_text=_("Addresses or networks such as 192.0.2.0/24, one in a line. Empty: as the settings say."),
    )
    policy_changed_at = models.DateTimeField(null=True, editable=False)
    first_used_at = models.DateTimeField(_("first used"), null=True, editable=False)
    last_used_at = models.DateTimeField(_("last used"), null=True, editable=False)
    created_at = models.DateTimeField(_("created"), default=timezone.now, editable=False)

    class Meta:
        verbose_name = _("API key")
        verbose_name_plural = _("API keys")
        indexes = [
            models.Index(fields=["-last_used_at"], name="apikey_recent"),
            models.Index("fingerprint", condition=Q(blocked=True), name="apikey_blocked"),
            models.Index("policy_changed_at", condition=Q(policy_changed_at__isnull=False), name="apikey_policy"),
        ]
        constraints = [
            models.CheckConstraint(condition=Q(price_factor__gte=0), name="apikey_factor_not_negative"),
        ]
        permissions = [("export_lists", _("Can export lists as CSV"))]

    def __str__(self) -> str:
        return f"{self.label} ({self.hint})" if self.label else f"{self.hint} {self.fingerprint[:8]}"


class Grant(models.Model):
    """An amount that a key may use; it counts from `valid_from` until `valid_until` or until it is revoked."""

    key = models.ForeignKey(ApiKey, models.PROTECT, related_name="grants", verbose_name=_("key"))
    amount_usd = UsdField(
        _("amount in USD"),
        validators=[MinValueValidator(Decimal("0.0000001")), MaxValueValidator(Decimal("999999999.9999999"))],
    )
    reason = models.CharField(_("reason"), max_length=200, blank=True)
    valid_from = models.DateTimeField(_("valid from"), default=timezone.now)
    valid_until = models.DateTimeField(_("valid until"), null=True, blank=True)
    revoked_at = models.DateTimeField(_("revoked at"), null=True, editable=False)
    given_by = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        models.SET_NULL,
        null=True,
        editable=False,
        related_name="+",
        verbose_name=_("given by"),
    )
    created_at = models.DateTimeField(_("created"), default=timezone.now, editable=False)

    class Meta:
        verbose_name = _("grant")
        verbose_name_plural = _("grants")
        constraints = [
            models.CheckConstraint(condition=Q(amount_usd__gt=0), name="grant_amount_positive"),
            models.CheckConstraint(
                condition=Q(valid_until=None) | Q(valid_until__gt=F("valid_from")),
                name="grant_ends_after_it_begins",
                violation_error_message=_("A grant must end after it begins."),
            ),
        ]

    def __str__(self) -> str:
        return f"{plain_usd(self.amount_usd)} USD · {self.key}"

    def validate_constraints(self, exclude: Collection[str] | None = None) -> None:
        # `valid_from` is on few forms, and Django looks at no constraint with a field that is not: the database would
        # refuse.
        super().validate_constraints(exclude=set(exclude or ()) - {"valid_from"})


class GrantToken(models.Model):
    """The token of a form by which grants were given: it gives none again, however often the form is sent."""

    token = models.UUIDField(primary_key=True, editable=False)
    used_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        default_permissions = ()

    def __str__(self) -> str:
        return str(self.token)


class Quantities(models.Model):
    """The columns of `billing.events.Usage`, under the same names; its seconds as whole milliseconds."""

    input_tokens = models.BigIntegerField(_("input tokens"), default=0)
    cached_input_tokens = models.BigIntegerField(_("cached input tokens"), default=0)
    cache_write_tokens = models.BigIntegerField(_("cache write tokens"), default=0)
    output_tokens = models.BigIntegerField(_("output tokens"), default=0)
    reasoning_tokens = models.BigIntegerField(_("of these reasoning tokens"), default=0)
    audio_input_tokens = models.BigIntegerField(_("audio input tokens"), default=0)
    cached_audio_input_tokens = models.BigIntegerField(_("cached audio input tokens"), default=0)
    audio_output_tokens = models.BigIntegerField(_("audio output tokens"), default=0)
    image_input_tokens = models.BigIntegerField(_("image input tokens"), default=0)
    cached_image_input_tokens = models.BigIntegerField(_("cached image input tokens"), default=0)
    image_output_tokens = models.BigIntegerField(_("image output tokens"), default=0)
    images = models.BigIntegerField(_("images"), default=0)
    characters = models.BigIntegerField(_("characters"), default=0)
    audio_ms = models.BigIntegerField(_("audio in ms"), default=0)

    class Meta:
        abstract = True


class UsageRecordQuerySet(models.QuerySet["UsageRecord"]):
    def update(self, **kwargs: Any) -> NoReturn:
        raise AppendOnlyError("usage records are never changed; reprice() alone re-rates them")

    def bulk_update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AppendOnlyError("usage records are never changed; reprice() alone re-rates them")

    def delete(self) -> NoReturn:
        raise AppendOnlyError("usage records are never removed; purge_usage() alone ends their retention")


class UsageRecord(Quantities):
    """One request, as it ended. Append-only: only `reprice` sets the last five columns anew.

    A request whose key was never accepted by the upstream has no key: see `record_events`.
    """

    event_id = EventIdField(_("event"), max_length=64, primary_key=True)
    key = models.ForeignKey(
        ApiKey, models.PROTECT, null=True, db_index=False, related_name="records", verbose_name=_("key")
    )
    started_at = models.DateTimeField(_("started"))
    day = models.DateField(_("day (UTC)"))
    endpoint = models.CharField(_("endpoint"), max_length=ENDPOINT_MAX_CHARS)
    method = models.CharField(_("method"), max_length=16)
    model = models.CharField(_("model"), max_length=MODEL_MAX_CHARS, blank=True)
    service_tier = models.CharField(_("service tier"), max_length=32, blank=True)
    is_batch = models.BooleanField(_("batch"), default=False)
    is_stream = models.BooleanField(_("stream"), default=False)
    status = models.SmallIntegerField(_("status"))
    outcome = models.CharField(_("outcome"), max_length=16)
    usage_source = models.CharField(_("usage from"), max_length=16)
    upstream_request_id = models.CharField(_("upstream's request id"), max_length=128, blank=True)
    first_byte_ms = models.IntegerField(_("first byte after ms"), default=0)
    duration_ms = models.BigIntegerField(_("duration in ms"), default=0)
    proxy_us = models.BigIntegerField(_("of these our own µs"), default=0)
    request_bytes = models.BigIntegerField(_("request bytes"), default=0)
    response_bytes = models.BigIntegerField(_("response bytes"), default=0)

    cost_usd = UsdField(_("cost in USD"), null=True)  # type: ignore[misc]  # None is unpriced
    pricing = models.CharField(_("pricing"), max_length=8, choices=Pricing)
    price_source = models.CharField(_("price from"), max_length=16, blank=True)
    price_version = models.CharField(_("price version"), max_length=64, blank=True)
    price_factor = models.DecimalField(_("price factor"), max_digits=9, decimal_places=4, default=Decimal(1))

    objects = UsageRecordQuerySet.as_manager()

    class Meta:
        verbose_name = _("usage record")
        verbose_name_plural = _("usage records")
        indexes = [
            models.Index("key", F("started_at").desc(), name="usagerecord_key_time"),
            TimeIndex(fields=("started_at",), name="usagerecord_time"),
            models.Index(
                F("started_at").desc(), condition=Q(pricing=Pricing.UNPRICED), name="usagerecord_unpriced_time"
            ),
            models.Index(
                "outcome", F("started_at").desc(), condition=~Q(outcome="completed"), name="usagerecord_ending_time"
            ),
        ]

    def __str__(self) -> str:
        return str(self.event_id)

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self._state.adding:
            raise AppendOnlyError("usage records are never changed; reprice() alone re-rates them")
        super().save(*args, **kwargs | {"force_insert": True})

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AppendOnlyError("usage records are never removed; purge_usage() alone ends their retention")


class UsageDay(Quantities):
    """What one key used on one UTC day with one model at one endpoint: derived from the records.

    The sums of times are there for averages: divide that of the first byte by `begun_streams`, our own by `requests`.
    """

    key = models.ForeignKey(
        ApiKey, models.PROTECT, null=True, db_index=False, related_name="days", verbose_name=_("key")
    )
    day = models.DateField(_("day (UTC)"))
    model = models.CharField(_("model"), max_length=MODEL_MAX_CHARS, blank=True)
    endpoint = models.CharField(_("endpoint"), max_length=ENDPOINT_MAX_CHARS)
    requests = models.BigIntegerField(_("requests"), default=0)
    errors = models.BigIntegerField(_("errors"), default=0)
    unpriced_requests = models.BigIntegerField(_("unpriced requests"), default=0)
    cost_usd = UsdField(_("cost in USD"), default=Decimal(0))
    begun_streams = models.BigIntegerField(_("streams that began"), default=0, db_default=0)
    first_byte_ms_sum = models.BigIntegerField(_("sum of ms to the first byte"), default=0)
    proxy_us_sum = models.BigIntegerField(_("sum of our own µs"), default=0)

    class Meta:
        verbose_name = _("usage by day")
        verbose_name_plural = _("usage by day")
        indexes = [models.Index("day", name="usageday_day")]
        constraints = [
            models.UniqueConstraint(
                fields=["key", "day", "model", "endpoint"], condition=Q(key__isnull=False), name="usageday_of_key"
            ),
            # Two, because to a unique index each NULL is another value.
            models.UniqueConstraint(
                fields=["day", "model", "endpoint"], condition=Q(key=None), name="usageday_without_key"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.day} {self.model or '-'} {self.endpoint}"


class Tally(models.Model):
    """What is summed up for pages that show much at once. `tokens` are those of all kinds, each counted once."""

    requests = models.BigIntegerField(_("requests"), default=0)
    errors = models.BigIntegerField(_("errors"), default=0)
    unpriced_requests = models.BigIntegerField(_("unpriced requests"), default=0)
    tokens = models.BigIntegerField(_("tokens"), default=0)
    cost_usd = UsdField(_("cost in USD"), default=Decimal(0))
    begun_streams = models.BigIntegerField(_("streams that began"), default=0, db_default=0)
    first_byte_ms_sum = models.BigIntegerField(_("sum of ms to the first byte"), default=0)
    proxy_us_sum = models.BigIntegerField(_("sum of our own µs"), default=0)

    class Meta:
        abstract = True


class KeyDay(Tally):
    """What one key used on one UTC day, with whatever model: a balance reads these, 90 rows a key."""

    key = models.ForeignKey(ApiKey, models.PROTECT, db_index=False, related_name="totals", verbose_name=_("key"))
    day = models.DateField(_("day (UTC)"))

    class Meta:
        verbose_name = _("usage of a key by day")
        verbose_name_plural = _("usage of keys by day")
        indexes = [models.Index("day", name="keyday_day")]
        constraints = [models.UniqueConstraint(fields=["key", "day"], name="keyday_once")]

    def __str__(self) -> str:
        return f"{self.day} {self.key_id}"


class UsageHour(Tally):
    """What all keys used in one UTC hour of one model at one endpoint: few enough rows for a page to read them all."""

    day = models.DateField(_("day (UTC)"))
    hour = models.SmallIntegerField(_("hour (UTC)"))
    model = models.CharField(_("model"), max_length=MODEL_MAX_CHARS, blank=True)
    endpoint = models.CharField(_("endpoint"), max_length=ENDPOINT_MAX_CHARS)

    class Meta:
        verbose_name = _("usage by hour")
        verbose_name_plural = _("usage by hour")
        constraints = [models.UniqueConstraint(fields=["day", "hour", "model", "endpoint"], name="usagehour_once")]

    def __str__(self) -> str:
        return f"{self.day} {self.hour:02}:00 {self.model or '-'}"


def _rate(label: Any) -> Any:
    return models.DecimalField(
        label, max_digits=16, decimal_places=7, null=True, blank=True, validators=[MinValueValidator(0)]
    )


class ModelPrice(models.Model):
    """A price that overrides the list's or adds to it, from `valid_from` until the next row of the same model.

    Tokens are in USD per million. Empty is unknown, 0 is free. `model` is a name (its snapshots and provider prefixes
    included, see `billing.pricing.lookup_order`) or a prefix that ends in `*`.
    """

    model = models.CharField(_("model"), max_length=MODEL_MAX_CHARS, help_text=_("A name, or a prefix ending in *."))
    valid_from = models.DateTimeField(_("valid from"))
    input = _rate(_("input"))
    cached_input = _rate(_("cached input"))
    cache_write = _rate(_("cache write"))
    output = _rate(_("output"))
    audio_input = _rate(_("audio input"))
    cached_audio_input = _rate(_("cached audio input"))
    audio_output = _rate(_("audio output"))
    image_input = _rate(_("image input"))
    cached_image_input = _rate(_("cached image input"))
    image_output = _rate(_("image output"))
    per_image = _rate(_("per image"))
    per_million_characters = _rate(_("per million characters"))
    per_minute = _rate(_("per minute of audio"))
    per_request = _rate(_("per request"))
    batch_factor = models.DecimalField(
        _("batch factor"),
        max_digits=9,
        decimal_places=4,
        null=True,
        blank=True,
        default=Decimal("0.5"),
        validators=[MinValueValidator(0)],
        help_text=_("Batches cost this much of the price. Empty: their price is unknown."),
    )
    flex_factor = models.DecimalField(
        _("flex factor"), max_digits=9, decimal_places=4, null=True, blank=True, validators=[MinValueValidator(0)]
    )
    priority_factor = models.DecimalField(
        _("priority factor"), max_digits=9, decimal_places=4, null=True, blank=True, validators=[MinValueValidator(0)]
    )
    details = models.JSONField(
        null=True, editable=False, help_text=_("The whole price, where these columns cannot say all of it.")
    )
    source = models.CharField(_("source"), max_length=16, choices=PriceSource, default=PriceSource.OWN, editable=False)
    note = models.CharField(_("note"), max_length=200, blank=True)
    created_by = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        models.SET_NULL,
        null=True,
        editable=False,
        related_name="+",
        verbose_name=_("created by"),
    )
    created_at = models.DateTimeField(_("created"), default=timezone.now, editable=False)

    class Meta:
        verbose_name = _("model price")
        verbose_name_plural = _("model prices")
        constraints = [
            models.UniqueConstraint(fields=["model", "valid_from", "source"], name="modelprice_one_at_a_time")
        ]

    def __str__(self) -> str:
        return f"{self.model} · {self.valid_from:%Y-%m-%d}"

    def clean(self) -> None:
        if "*" in self.model[:-1]:
            refused = _("%(name)s is no name of a model; only its last character may be *.") % {"name": self.model}
            raise ValidationError({"model": refused})

    def validate_constraints(self, exclude: Collection[str] | None = None) -> None:
        # `source` is on no form, and Django looks at no constraint with a field that is not: the database would refuse.
        super().validate_constraints(exclude=set(exclude or ()) - {"source"})


class Purge(models.Model):
    """One end of retention. Days before the latest `before` keep their roll-ups, which are never rebuilt again."""

    before = models.DateField(_("records before"))
    started_at = models.DateTimeField(_("started"), default=timezone.now)
    finished_at = models.DateTimeField(_("finished"), null=True)
    deleted = models.BigIntegerField(_("records removed"), default=0)

    class Meta:
        verbose_name = _("purge")
        verbose_name_plural = _("purges")

    def __str__(self) -> str:
        return f"{self.before}"
