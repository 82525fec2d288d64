//! `Columns` and `Role`: which column of an outbox table plays which part.
//!
//! The names come from `WALPOST_COLUMN_*`; the defaults are the columns that `walpost init` makes and, where both have
//! one, Debezium's outbox columns.

use std::fmt;

/// The part a column plays in an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The message id.
    Id,
    /// What the event is about; the default template routes by it.
    AggregateType,
    /// The message key.
    AggregateId,
    /// The event's type.
    Type,
    /// The message's bytes.
    Payload,
    /// A topic of the row's own.
    Topic,
    /// A JSON object of properties.
    Headers,
    /// Deliver no sooner than this.
    DeliverAt,
    /// When the event happened.
    CreatedAt,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 9] = [
        Self::Id,
        Self::AggregateType,
        Self::AggregateId,
        Self::Type,
        Self::Payload,
        Self::Topic,
        Self::Headers,
        Self::DeliverAt,
        Self::CreatedAt,
    ];

    /// The column's default name, which is also what a topic template calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Id => "id",
            Self::AggregateType => "aggregatetype",
            Self::AggregateId => "aggregateid",
            Self::Type => "type",
            Self::Payload => "payload",
            Self::Topic => "topic",
            Self::Headers => "headers",
            Self::DeliverAt => "deliver_at",
            Self::CreatedAt => "created_at",
        }
    }

    /// The setting that names the column.
    pub const fn env_var(self) -> &'static str {
        match self {
            Self::Id => "WALPOST_COLUMN_ID",
            Self::AggregateType => "WALPOST_COLUMN_AGGREGATETYPE",
            Self::AggregateId => "WALPOST_COLUMN_AGGREGATEID",
            Self::Type => "WALPOST_COLUMN_TYPE",
            Self::Payload => "WALPOST_COLUMN_PAYLOAD",
            Self::Topic => "WALPOST_COLUMN_TOPIC",
            Self::Headers => "WALPOST_COLUMN_HEADERS",
            Self::DeliverAt => "WALPOST_COLUMN_DELIVER_AT",
            Self::CreatedAt => "WALPOST_COLUMN_CREATED_AT",
        }
    }

    /// Without these a row is no event. (`aggregatetype` is required only by a template that names it.)
    pub const fn is_required(self) -> bool {
        matches!(self, Self::Id | Self::AggregateId | Self::Payload)
    }

    pub(super) const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The configured column names. An empty name turns an optional column off even where the table has one of the default
/// name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns {
    /// `WALPOST_COLUMN_ID`.
    pub id: String,
    /// `WALPOST_COLUMN_AGGREGATETYPE`.
    pub aggregatetype: String,
    /// `WALPOST_COLUMN_AGGREGATEID`.
    pub aggregateid: String,
    /// `WALPOST_COLUMN_TYPE`.
    pub event_type: String,
    /// `WALPOST_COLUMN_PAYLOAD`.
    pub payload: String,
    /// `WALPOST_COLUMN_TOPIC`.
    pub topic: String,
    /// `WALPOST_COLUMN_HEADERS`.
    pub headers: String,
    /// `WALPOST_COLUMN_DELIVER_AT`.
    pub deliver_at: String,
    /// `WALPOST_COLUMN_CREATED_AT`.
    pub created_at: String,
}

impl Default for Columns {
    fn default() -> Self {
        let name = |role: Role| role.name().to_owned();
        Self {
            id: name(Role::Id),
            aggregatetype: name(Role::AggregateType),
            aggregateid: name(Role::AggregateId),
            event_type: name(Role::Type),
            payload: name(Role::Payload),
            topic: name(Role::Topic),
            headers: name(Role::Headers),
            deliver_at: name(Role::DeliverAt),
            created_at: name(Role::CreatedAt),
        }
    }
}

impl Columns {
    /// The name of the column that plays `role`.
    pub fn name(&self, role: Role) -> &str {
        match role {
            Role::Id => &self.id,
            Role::AggregateType => &self.aggregatetype,
            Role::AggregateId => &self.aggregateid,
            Role::Type => &self.event_type,
            Role::Payload => &self.payload,
            Role::Topic => &self.topic,
            Role::Headers => &self.headers,
            Role::DeliverAt => &self.deliver_at,
            Role::CreatedAt => &self.created_at,
        }
    }

    /// The column that a template's `{placeholder}` means: the one configured for the role of that name, else the column
    /// of that very name.
    ///
    /// Roles come first, so that the default template works with renamed columns, and so that a column added to the table
    /// later cannot change where events go.
    pub fn resolve<'a>(&'a self, placeholder: &'a str) -> &'a str {
        Role::ALL
            .into_iter()
            .find(|role| role.name() == placeholder)
            .map(|role| self.name(role))
            .filter(|name| !name.is_empty())
            .unwrap_or(placeholder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_columns_that_init_makes() {
        let columns = Columns::default();
        for role in Role::ALL {
            assert_eq!(columns.name(role), role.name());
            assert_eq!(
                role.env_var(),
                format!("WALPOST_COLUMN_{}", role.name().to_uppercase())
            );
        }
    }

    #[test]
    fn a_placeholder_means_the_configured_column_before_one_of_its_name() {
        let columns = Columns {
            aggregatetype: "kind".to_owned(),
            event_type: String::new(),
            ..Columns::default()
        };
        assert_eq!(columns.resolve("aggregatetype"), "kind");
        assert_eq!(columns.resolve("region"), "region");
        assert_eq!(
            columns.resolve("type"),
            "type",
            "turned off: the plain column"
        );
    }
}
