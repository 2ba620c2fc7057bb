"""Everything that knows Ray, kept thin: sessions, actors, dispatch. The work itself is in the library."""
