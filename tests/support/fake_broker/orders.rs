//! What a test may do to topics, as operators, other clients and storage do it to a real broker's.

use super::model::Cluster;
use super::topics::Settings;

impl Cluster {
    /// Changes what is set on a topic. What follows from it for the producers that are open follows at once: they are closed
    /// where encryption is required now (`Producer.checkEncryption`) or the topic has migrated, closed without a word where
    /// another client has fenced them out (`ProducerAccessMode.ExclusiveWithFencing`), and read again where the publish rate is
    /// free.
    pub(super) fn set(&mut self, topic: &str, change: impl FnOnce(&mut Settings)) {
        let before = self.topics.settings(topic);
        change(self.topics.settings_mut(topic));
        let now = self.topics.settings(topic);
        let is_meant = |name: &str| name == topic || is_partition_of(name, topic);
        let producers = self.open_producers(|_, producer| is_meant(&producer.topic));
        if now.encryption_required && !before.encryption_required {
            self.disconnect(&producers, None);
        }
        if let Some(url) = now.migrated_to.filter(|_| before.migrated_to.is_none()) {
            for &(at, id) in &producers {
                self.tell_migrated(at, id, &url);
                self.remove(at, id);
            }
        }
        if now.exclusive.is_some() && before.exclusive.is_none() {
            for &(at, id) in &producers {
                if let Some(connection) = self.connections.get_mut(&at) {
                    connection.fenced_out.insert(id);
                }
                self.remove(at, id);
            }
        }
        if now.publish_rate.is_none() && before.publish_rate.is_some() {
            for name in self.topics.names() {
                if is_meant(&name) {
                    self.period_is_over(&name);
                }
            }
        }
    }

    /// Ends the writes that pend, of all topics: stored, or failed.
    pub(super) fn settle(&mut self, written: bool) {
        for topic in self.topics.pending_topics() {
            if written {
                self.write(&topic);
            } else {
                self.fail_writes(&topic);
            }
        }
        self.finish_closes();
    }

    /// Unloads a topic (`PersistentTopic.close`): its producers are closed, and what pends ends behind that: stored, with its
    /// receipt, or given up without a word (`TopicClosedException`). It is loaded again when it is asked for.
    pub(super) fn unload(&mut self, topic: &str, next: Option<&str>, written: bool) {
        self.disconnect(&self.producers_of(topic), next);
        if written {
            self.write(topic);
        }
        let _given_up = self.topics.drop_writes(topic);
        self.finish_closes();
    }

    /// Deletes a topic without partitions, or one partition, by force (`PersistentTopic.delete`): what pends is lost.
    pub(super) fn delete(&mut self, topic: &str) {
        self.disconnect(&self.producers_of(topic), None);
        self.topics.delete(topic);
        self.finish_closes();
    }

    /// Deletes the partitions of a topic: its metadata says so, and stays until [`Topics::end_deletion`]
    /// (`PersistentTopicsBase.internalDeletePartitionedTopic`).
    ///
    /// [`Topics::end_deletion`]: super::topics::Topics::end_deletion
    pub(super) fn begin_deletion(&mut self, topic: &str) {
        for partition in self.topics.begin_deletion(topic) {
            self.delete(&partition);
        }
    }

    /// Closes every producer that is open on a broker, and leaves its topics as they are.
    pub(super) fn close_producers(&mut self, broker: usize, next: Option<&str>) {
        let producers = self.open_producers(|at, _| at == broker);
        self.disconnect(&producers, next);
    }

    /// Closes every producer that is open on a broker, after saying that its topic has moved to another cluster.
    pub(super) fn migrate(&mut self, broker: usize, url: &str) {
        for (at, id) in self.open_producers(|at, _| at == broker) {
            self.tell_migrated(at, id, url);
            self.remove(at, id);
        }
    }

    /// Says these bytes on every connection of a broker.
    pub(super) fn say(&mut self, broker: usize, bytes: &[u8]) {
        for (&id, _) in self.connections.iter().filter(|(_, c)| c.broker == broker) {
            self.answers.say(id, bytes.to_vec());
        }
    }

    /// Ends every connection of a broker.
    pub(super) fn end_connections(&mut self, broker: usize) {
        let of_broker = self.connections.iter().filter(|(_, c)| c.broker == broker);
        let ids: Vec<u64> = of_broker.map(|(&id, _)| id).collect();
        for id in ids {
            self.gone(id);
        }
        self.finish_closes();
    }
}

fn is_partition_of(name: &str, topic: &str) -> bool {
    name.strip_prefix(topic)
        .is_some_and(|rest| rest.starts_with("-partition-"))
}
