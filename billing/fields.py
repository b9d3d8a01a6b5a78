"""Money in the database: whole tenths of a micro-dollar, so that sums are exact everywhere."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from typing import TYPE_CHECKING, Any

from django import forms
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models.expressions import Combinable
from django.utils.translation import gettext_lazy as _

if TYPE_CHECKING:
    _BigIntegerField = models.BigIntegerField[Decimal | int | str | Combinable, Decimal]
else:
    _BigIntegerField = models.BigIntegerField

UNITS_PER_USD = 10**7
_UNIT = Decimal(1).scaleb(-7)


def usd_to_units(amount_usd: Decimal) -> int:
    """Return the amount in whole tenths of a micro-dollar, half to even."""
    return int((amount_usd * UNITS_PER_USD).to_integral_value(ROUND_HALF_EVEN))


def units_to_usd(units: int) -> Decimal:
    return (Decimal(int(units)) * _UNIT).quantize(_UNIT)


def plain_usd(amount_usd: Decimal) -> str:
    """Return an amount as people write it: two decimals, and more only where they are not zero."""
    text = f"{amount_usd:.7f}".rstrip("0")
    return text + "0" * max(0, 2 - len(text.partition(".")[2]))


class EventIdField(models.CharField):  # type: ignore[type-arg]
    """The id of an event. Under this name of its type PostgreSQL gets no second index for LIKE, which ids never see."""

    def db_type(self, connection: object) -> str:
        return f"character varying({self.max_length})"


class UsdField(_BigIntegerField):
    """USD as a Decimal with 7 places, kept as a whole number of 10⁻⁷ USD.

    Not DecimalField: SQLite keeps that as a binary float, and a sum that is added to a million times drifts.
    """

    description = "USD"

    def from_db_value(self, value: Any, expression: object, connection: object) -> Decimal | None:
        return None if value is None else units_to_usd(value)

    def to_python(self, value: Any) -> Any:
        if value is None or value == "":
            return None
        try:
            return Decimal(value).quantize(_UNIT)
        except (ArithmeticError, TypeError, ValueError) as exc:
            raise ValidationError(_("Not an amount of money."), code="invalid") from exc

    def get_prep_value(self, value: Any) -> int | None:
        return None if value is None else usd_to_units(Decimal(value))

    def value_to_string(self, obj: models.Model) -> str:
        return str(self.value_from_object(obj))

    def formfield(self, **kwargs: Any) -> Any:
        kwargs.setdefault("form_class", UsdFormField)
        return models.Field.formfield(self, **kwargs)


class UsdFormField(forms.DecimalField):
    """An amount below a billion USD, shown without the zeros at its end."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs | {"max_digits": 16, "decimal_places": 7})

    def prepare_value(self, value: Any) -> Any:
        return f"{value.normalize():f}" if isinstance(value, Decimal) else value
