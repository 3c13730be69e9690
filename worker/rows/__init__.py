"""From raw changes to typed ones: what the wire left out is read again here."""
