"""The words that pages and questions are made of."""

from __future__ import annotations

SUBJECTS = (
    *("apples", "beef", "beer", "books", "bricks", "butter", "cars", "cement", "cheese", "coal"),
    *("coffee", "copper", "corn", "cotton", "eggs", "fish", "gas", "glass", "gold", "grapes"),
    *("honey", "iron", "laptops", "milk", "oil", "paper", "phones", "planes", "rice", "salt"),
    *("ships", "shoes", "silk", "silver", "steel", "sugar", "tea", "toys", "trains", "wheat"),
)
MEASURES = (
    *("costs", "demand", "exports", "fees", "growth", "imports", "jobs", "loans", "losses"),
    *("orders", "output", "prices", "profit", "returns", "sales", "storage", "supply", "taxes"),
    *("wages", "waste"),
)
PLACES = (
    *("Athens", "Berlin", "Boston", "Brazil", "Cairo", "Chile", "China", "Cuba", "Dallas"),
    *("Delhi", "Dublin", "Egypt", "Finland", "France", "Ghana", "India", "Iran", "Italy", "Japan"),
    *("Kenya", "Korea", "Lagos", "Lima", "Lisbon", "London", "Madrid", "Mali", "Nepal", "Norway"),
    *("Oslo", "Paris", "Peru", "Poland", "Prague", "Quito", "Rome", "Seoul", "Spain", "Sweden"),
    *("Texas", "Tokyo", "Turkey", "Vienna", "Zurich"),
)
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
VERBS = ("fell", "grew", "held", "rose", "sank")
KINDS = ("bars", "line", "pie", "table", "text")

# Everything that is written on a page or, for the kinds, drawn.
WORDS = (*SUBJECTS, *MEASURES, *PLACES, *MONTHS, *VERBS, *KINDS)
