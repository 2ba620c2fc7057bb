"""Everything that knows Ray, kept thin: sessions, actors, queues. The work itself is in the library, `calibprune`."""
